"""Words, numbers and people for the generated text of demo_data.py."""

import random

SMALL_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen").split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth").split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November "
          "December").split()
DAYS_IN_MONTH = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
SEASONS = ("winter", "winter", "spring", "spring", "spring", "summer", "summer", "summer",
           "autumn", "autumn", "autumn", "winter")
ANIMALS = "fox bear rabbit mouse owl frog hedgehog duck squirrel cat turtle wolf goat crow".split()
TRAITS = "small brave shy clever lazy kind old curious hungry proud patient cheerful".split()
GIRLS = "Anna Bella Clara Dora Emma Fiona Greta Hanna Iris Julia Lena Mia Nora Olga Rosa Tess".split()
BOYS = "Adam Ben Carl David Emil Felix Georg Hugo Ivan Jonas Karl Leo Max Noah Oskar Tom".split()


class Picker:
    """Random choices from a seed, the same on every Python version: random() is the one generator
    function whose sequence Python promises to keep."""

    def __init__(self, seed):
        self._random = random.Random(seed).random

    def number(self, low, high):
        """An integer in [low, high]."""
        return low + int(self._random() * (high - low + 1))

    def one(self, options):
        return options[int(self._random() * len(options))]

    def several(self, options, count):
        """`count` different options, in random order."""
        rest = list(options)
        return [rest.pop(int(self._random() * len(rest))) for _ in range(count)]

    def chance(self, probability):
        return self._random() < probability


def in_words(number):
    """0 <= number < 1000 as English words."""
    if number < 20:
        return SMALL_NUMBERS[number]
    if number < 100:
        tens, units = divmod(number, 10)
        return TENS[tens] + (f"-{SMALL_NUMBERS[units]}" if units else "")
    hundreds, rest = divmod(number, 100)
    return f"{SMALL_NUMBERS[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")


def capital(sentence):
    return sentence[0].upper() + sentence[1:]


def with_article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(count, noun):
    """`one apple`, `two apples`."""
    return f"{in_words(count)} {noun}" + ("" if count == 1 else "s")


def listed(items):
    """`a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


class Character:
    """Somebody with a name that fits the pronouns; not the name or animal of `other`."""

    def __init__(self, pick, other=None):
        female = pick.chance(0.5)
        self.name = pick.one([n for n in (GIRLS if female else BOYS)
                              if other is None or n != other.name])
        self.animal = pick.one([a for a in ANIMALS if other is None or a != other.animal])
        self.trait = pick.one(TRAITS)
        self.he, self.him, self.his = ("she", "her", "her") if female else ("he", "him", "his")
