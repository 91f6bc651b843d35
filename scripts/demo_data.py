#!/usr/bin/env python3
"""Seeded, generated, English-like text: what the bundled demonstration model is trained on.

    scripts/demo_data.py --seed 1 --bytes 4000000 --out train.txt
    scripts/demo_data.py --seed 2 --bytes 2000 --kind recipe

Five kinds of documents in equal shares of bytes: little stories, arithmetic in words, calendar
questions, recipes, and slot-value records with the sentence that says them. Each kind has facts that
must agree with each other (a sum, a weekday, the ingredients a recipe uses), so that a language model
has something to learn beyond the next likely word.

The text depends on the seed alone, not on the Python version: only random.Random.random() is used,
the one generator function whose sequence Python promises to keep.
"""

import argparse
import datetime
import random
import sys

END_OF_DOCUMENT = "<|endoftext|>"

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
GIRLS = "Anna Bella Clara Dora Emma Fiona Greta Hanna Iris Julia Lena Mia Nora Olga Rosa Tess".split()
BOYS = "Adam Ben Carl David Emil Felix Georg Hugo Ivan Jonas Karl Leo Max Noah Oskar Tom".split()


class Picker:
    """Random choices from a seed. `random` is the only primitive, see the module's text."""

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


# ---- little stories -----------------------------------------------------------------------------

ANIMALS = "fox bear rabbit mouse owl frog hedgehog duck squirrel cat turtle wolf goat crow".split()
TRAITS = "small brave shy clever lazy kind old curious hungry proud patient cheerful".split()
PLACES = ("by the river", "in the deep forest", "on a green hill", "near the old mill",
          "under a tall oak", "at the edge of the village", "in a quiet valley", "by the sea")
TIMES = ("One sunny morning", "One cold evening", "One day in spring", "On a windy afternoon",
         "Early one morning", "One rainy day", "Late one night", "On the first day of autumn")
TREASURES = ("red ball", "silver key", "warm scarf", "wooden flute", "blue kite", "golden ring",
             "old map", "little lantern", "favourite book", "green umbrella")
FOODS = ("apple", "loaf of bread", "piece of cheese", "basket of berries", "pot of honey",
         "bag of nuts", "carrot", "plum cake")
HIDING = ("under a bush", "behind a stone", "in the tall grass", "on a high branch",
          "beside the well", "inside a hollow tree", "below the bridge", "at the bottom of a box")
SKILLS = (("swim", "the pond"), ("climb", "the oldest tree"), ("sing", "the village square"),
          ("whistle", "the garden"), ("dance", "the meadow"), ("skate", "the frozen lake"))
PROJECTS = (("bridge", "planks"), ("boat", "branches"), ("tower", "stones"), ("hut", "logs"),
            ("swing", "ropes"), ("raft", "reeds"))
STORMS = ("rain began to fall", "snow covered the path", "the wind grew strong",
          "thunder rolled over the hills", "a thick fog came up")
FEELINGS = "sad worried tired afraid unhappy".split()
GOOD_FEELINGS = "happy glad proud grateful cheerful".split()
ENDINGS = ("From that day on they were the best of friends.", "And they laughed all the way home.",
           "That night {a} slept very well.", "{a} never forgot that day.",
           "\"Tomorrow we will meet again,\" said {b}.", "And so {b} and {a} walked home together.")


class Character:
    def __init__(self, pick, other=None):
        female = pick.chance(0.5)
        self.name = pick.one([n for n in (GIRLS if female else BOYS)
                              if other is None or n != other.name])
        self.animal = pick.one([a for a in ANIMALS if other is None or a != other.animal])
        self.trait = pick.one(TRAITS)
        self.he, self.him, self.his = ("she", "her", "her") if female else ("he", "him", "his")


def story_opening(pick, hero):
    place = pick.one(PLACES)
    return pick.one((
        f"Once upon a time there was {with_article(hero.trait)} {hero.animal} named {hero.name}. "
        f"{capital(hero.he)} lived {place}.",
        f"{hero.name} was {with_article(hero.trait)} {hero.animal} who lived {place}.",
        f"There once lived {with_article(hero.animal)} {place}. {capital(hero.his)} name was "
        f"{hero.name}, and {hero.he} was very {hero.trait}."))


def story_lost(pick, a, b):
    thing, where, searched = pick.one(TREASURES), *pick.several(HIDING, 2)
    return [
        f"{pick.one(TIMES)}, {a.name} could not find {a.his} {thing}.",
        pick.one((f"{capital(a.he)} looked {searched}, but the {thing} was not there.",
                  f"It was not {searched}, where {a.he} had played the day before.",
                  f"\"Did I leave it {searched}?\" {a.he} wondered, but no, it was not there.")),
        pick.one((f"{a.name} felt {pick.one(FEELINGS)} and sat down.",
                  f"{capital(a.he)} was so {pick.one(FEELINGS)} that {a.he} began to cry.")),
        pick.one((f"Then {b.name} the {b.animal} came along. \"What is wrong?\" asked {b.name}.",
                  f"{b.name}, {with_article(b.trait)} {b.animal}, saw {a.him} and asked why.")),
        f"\"I have lost my {thing},\" said {a.name}. "
        + pick.one((f"\"I will help you,\" said {b.name}.",
                    f"\"Do not worry,\" said {b.name}, \"two can see more than one.\"")),
        pick.one((f"Together they looked {where}. There was the {thing}!",
                  f"They searched all day, and at last {b.name} found the {thing} {where}.")),
        pick.one((f"{a.name} was so {pick.one(GOOD_FEELINGS)} that {a.he} gave {b.name} a big hug.",
                  f"\"Thank you, {b.name}!\" cried {a.name}, and {a.he} was {pick.one(GOOD_FEELINGS)}."))]


def story_sharing(pick, a, b):
    food = pick.one(FOODS)
    return [
        f"{pick.one(TIMES)}, {a.name} found {with_article(food)} {pick.one(HIDING)}.",
        pick.one((f"\"This {food} is only for me,\" thought {a.name}.",
                  f"{capital(a.he)} was hungry and wanted to eat the whole {food} at once.")),
        f"But then {a.he} saw {b.name}, {with_article(b.trait)} {b.animal}, who had nothing to eat.",
        pick.one((f"{b.name} looked at the {food} and said nothing.",
                  f"\"What a fine {food} you have,\" said {b.name}. \"I have not eaten since "
                  f"{pick.one(DAYS)}.\"")),
        pick.one((f"{a.name} thought for a while. \"Come,\" {a.he} said, \"we will share it.\"",
                  f"{a.name} felt sorry for {b.him}. \"Sit down with me,\" said {a.name}.")),
        f"So {a.name} gave half of the {food} to {b.name}.",
        pick.one((f"It tasted better than any {food} that {a.he} had ever eaten alone.",
                  f"\"You are a true friend,\" said {b.name}, and both of them were "
                  f"{pick.one(GOOD_FEELINGS)}."))]


def story_storm(pick, a, b):
    thing = pick.one(TREASURES)
    return [
        f"{pick.one(TIMES)}, {a.name} went out for a walk with {a.his} {thing}.",
        f"Suddenly {pick.one(STORMS)}, and {a.name} "
        + pick.one(("could not see the way home.", "did not know where to go.",
                    f"was far away from {a.his} house.")),
        f"\"Is anybody there?\" called {a.name}. {capital(a.he)} was {pick.one(FEELINGS)}.",
        pick.one((f"{b.name} the {b.animal} heard {a.him} and opened the door.",
                  f"A small light shone in the dark. It was the house of {b.name} the {b.animal}.")),
        pick.one((f"\"Come in and get warm,\" said {b.name}. They drank tea and told stories until it "
                  f"was over.",
                  f"{b.name} gave {a.him} {with_article(pick.one(FOODS))} and a place to sleep.")),
        f"In the morning {a.name} gave {b.name} the {thing} to say thank you."]


def story_skill(pick, a, b):
    skill, place = pick.one(SKILLS)
    tries = pick.number(2, 9)
    return [
        pick.one((f"More than anything, {a.name} wanted to learn to {skill}.",
                  f"{a.name} was sad because {a.he} could not {skill}.")),
        f"Every day {a.he} went to {place}, but "
        + pick.one(("it never worked.", f"{a.he} was too afraid.", "something always went wrong.")),
        f"\"You will never learn to {skill},\" laughed the {pick.one(ANIMALS)}, and {a.name} was "
        f"{pick.one(FEELINGS)}.",
        f"Only {b.name}, the {b.trait} {b.animal}, did not laugh. "
        + pick.one((f"\"Try once more,\" said {b.name}.",
                    f"\"I will show you how to {skill},\" said {b.name}.")),
        f"{a.name} tried {in_words(tries)} times, and then one more time.",
        f"At last {a.he} could {skill}! {b.name} was {pick.one(GOOD_FEELINGS)} for {a.him}."]


def story_building(pick, a, b):
    project, material = pick.one(PROJECTS)
    count = pick.number(3, 30)
    return [
        f"{pick.one(TIMES)}, {a.name} wanted to build {with_article(project)}.",
        f"{capital(a.he)} needed {in_words(count)} {material}, but "
        + pick.one((f"{a.he} could not carry them alone.", f"{a.he} had only {in_words(count - 2)}.")),
        pick.one((f"{a.name} asked {b.name} the {b.animal}, who was very strong.",
                  f"{b.name} the {b.animal} had many {material} and was happy to help.")),
        f"\"If we work together, the {project} will be ready "
        + pick.one(("today", "before night", f"on {pick.one(DAYS)}")) + f",\" said {b.name}.",
        pick.one((f"They carried all the {material} and worked until the sun went down.",
                  f"First they counted the {material}, and then they began to work.")),
        f"When the {project} was ready, "
        + pick.one(("everybody came to see it.", f"{a.name} danced with joy.",
                    f"{b.name} said it was the best {project} of all."))]


def story(pick):
    a = Character(pick)
    b = Character(pick, a)
    plot = pick.one((story_lost, story_sharing, story_storm, story_skill, story_building))
    ending = pick.one(ENDINGS).format(a=a.name, b=b.name)
    return " ".join([story_opening(pick, a), *plot(pick, a, b), ending])


# ---- arithmetic in words ------------------------------------------------------------------------

THINGS = "apple pear coin stone book pencil button egg marble stamp flower cup".split()


def arithmetic_question(pick):
    kind = pick.one(("plus", "minus", "times"))
    if kind == "times":
        x, y = pick.number(2, 12), pick.number(2, 12)
        result = x * y
    else:
        x, y = pick.number(0, 99), pick.number(0, 60)
        x, y = (max(x, y), min(x, y)) if kind == "minus" else (x, y)
        result = x + y if kind == "plus" else x - y
    sentence = f"{in_words(x)} {kind} {in_words(y)}"
    return f"What is {sentence}? {capital(sentence)} is {in_words(result)}."


def arithmetic_problem(pick):
    a = Character(pick)
    b = Character(pick, a)
    thing = pick.one(THINGS)
    have, change = pick.number(5, 40), pick.number(1, 15)
    if pick.chance(0.5):
        return (f"{a.name} has {plural(have, thing)}. {b.name} gives {a.him} {in_words(change)} more. "
                f"Now {a.name} has {plural(have + change, thing)}.")
    change = min(change, have - 1)
    return (f"{a.name} had {plural(have, thing)} and gave {in_words(change)} of them to {b.name}. "
            f"Now {a.he} has {plural(have - change, thing)}.")


def arithmetic_counting(pick):
    step, start = pick.number(2, 10), pick.number(0, 20)
    numbers = [in_words(start + i * step) for i in range(pick.number(4, 8))]
    return f"Count by {in_words(step)} from {numbers[0]}: {', '.join(numbers)}."


def arithmetic_comparison(pick):
    x, y = pick.several(range(0, 200), 2)
    return (f"Which is larger, {in_words(x)} or {in_words(y)}? {capital(in_words(max(x, y)))} is "
            f"larger than {in_words(min(x, y))}.")


def arithmetic_price(pick):
    count, price = pick.number(2, 9), pick.number(2, 12)
    thing = pick.one([t for t in THINGS if t != "coin"])
    return (f"One {thing} costs {plural(price, 'coin')}. How much do {plural(count, thing)} cost? "
            f"They cost {plural(count * price, 'coin')}.")


def arithmetic(pick):
    makers = (arithmetic_question, arithmetic_question, arithmetic_problem, arithmetic_counting,
              arithmetic_comparison, arithmetic_price)
    return "\n".join(pick.one(makers)(pick) for _ in range(pick.number(2, 5)))


# ---- calendar questions -------------------------------------------------------------------------


def calendar_day_shift(pick):
    day, shift, later = pick.number(0, 6), pick.number(1, 10), pick.chance(0.5)
    answer = DAYS[(day + (shift if later else -shift)) % 7]
    if later:
        return (f"Today is {DAYS[day]}. What day will it be in {plural(shift, 'day')}? "
                f"It will be {answer}.")
    ago = plural(shift, "day")
    return f"Today is {DAYS[day]}. What day was it {ago} ago? It was {answer}."


def calendar_month_shift(pick):
    month, shift = pick.number(0, 11), pick.number(1, 6)
    answer = MONTHS[(month + shift) % 12]
    return (f"Which month comes {plural(shift, 'month')} after {MONTHS[month]}? "
            f"{answer} comes {plural(shift, 'month')} after {MONTHS[month]}.")


def calendar_month_fact(pick):
    i = pick.number(0, 11)
    month = MONTHS[i]
    return pick.one((
        f"How many days are in {month}? There are {in_words(DAYS_IN_MONTH[i])} days in {month}"
        + (", or twenty-nine in a leap year." if i == 1 else "."),
        f"In which season is {month}? {month} is in {SEASONS[i]}.",
        f"Which is the {ORDINALS[i]} month of the year? The {ORDINALS[i]} month is {month}."))


def calendar_weekday(pick):
    first = datetime.date(2000, 1, 1).toordinal()
    date = datetime.date.fromordinal(first + pick.number(0, 365 * 40))
    written = f"{date.day} {MONTHS[date.month - 1]} {date.year}"
    next_day = date + datetime.timedelta(days=1)
    return (f"If {written} is a {DAYS[date.weekday()]}, what is the next day? It is "
            f"{DAYS[next_day.weekday()]}, {next_day.day} {MONTHS[next_day.month - 1]} "
            f"{next_day.year}.")


def calendar_clock(pick):
    hour, length = pick.number(6, 20), pick.number(1, 3)
    event = pick.one(("The meeting", "The film", "The concert", "The lesson", "The game"))
    minute = pick.one(("00", "15", "30", "45"))
    return (f"{event} starts at {hour}:{minute} and takes {plural(length, 'hour')}. When does it "
            f"end? It ends at {hour + length}:{minute}.")


def calendar(pick):
    makers = (calendar_day_shift, calendar_month_shift, calendar_month_fact, calendar_weekday,
              calendar_clock)
    return "\n".join(pick.one(makers)(pick) for _ in range(pick.number(2, 5)))


# ---- recipes ------------------------------------------------------------------------------------

VEGETABLES = ("potatoes carrots onions leeks beans peas mushrooms tomatoes peppers beets "
              "cabbage spinach").split()
FRUITS = "apples pears plums cherries berries peaches lemons oranges".split()
HERBS = "parsley basil thyme dill mint rosemary".split()
FATS = ("butter", "olive oil", "lard")
SWEET_SPICES = "cinnamon vanilla ginger nutmeg".split()
CAKES = "old-style simple quick sweet fine".split()
GRAINS = "rice barley noodles lentils millet".split()


def numbered(steps):
    return "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))


def recipe_text(title, people, ingredients, steps):
    items = "\n".join(f"- {item}" for item in ingredients)
    return f"Recipe: {title}\nFor {in_words(people)} people.\n{items}\n{numbered(steps)}"


def recipe_soup(pick):
    people, herb, fat = pick.number(2, 8), pick.one(HERBS), pick.one(FATS)
    main, *others = pick.several(VEGETABLES, pick.number(2, 3))
    minutes = pick.number(3, 9) * 5
    title = f"{capital(main)} soup with {herb}"
    ingredients = [f"{people * 150} grams of {main}", *(f"{people * 50} grams of {v}" for v in others),
                   f"{people} cups of water", f"1 spoon of {fat}", f"some {herb}", "salt"]
    return recipe_text(title, people, ingredients, [
        f"Wash and cut the {listed([main, *others])}.",
        f"Heat the {fat} in a large pot and fry the {others[0]} for {pick.number(2, 6)} minutes.",
        f"Add the {main} and the water, and cook for {minutes} minutes.",
        f"Season with salt, sprinkle with {herb} and serve hot."])


def recipe_cake(pick):
    people, fruit, spice = pick.number(4, 12), pick.one(FRUITS), pick.one(SWEET_SPICES)
    heat, minutes, eggs = pick.number(16, 21) * 10, pick.number(5, 12) * 5, max(2, people // 3)
    title = f"{capital(pick.one(CAKES))} cake with {fruit}"
    ingredients = [f"{people * 30} grams of flour", f"{people * 20} grams of sugar",
                   f"{people * 15} grams of butter", f"{eggs} eggs", f"{people * 40} grams of {fruit}",
                   f"1 spoon of {spice}"]
    return recipe_text(title, people, ingredients, [
        "Beat the butter and the sugar until they are light.",
        f"Add the eggs one by one, then the flour and the {spice}.",
        f"Put half of the dough into a tin, lay the {fruit} on it and cover with the rest.",
        f"Bake at {heat} degrees for {minutes} minutes and let it cool."])


def recipe_bowl(pick):
    people, grain, herb, fat = pick.number(1, 6), pick.one(GRAINS), pick.one(HERBS), pick.one(FATS)
    first, second = pick.several(VEGETABLES, 2)
    minutes = {"rice": 18, "barley": 30, "noodles": 8, "lentils": 25, "millet": 20}[grain]
    title = f"{capital(grain)} with {first} and {second}"
    ingredients = [f"{people * 80} grams of {grain}", f"{people * 100} grams of {first}",
                   f"{people * 60} grams of {second}", f"2 spoons of {fat}", f"some {herb}",
                   "salt and pepper"]
    return recipe_text(title, people, ingredients, [
        f"Cook the {grain} in salted water for {minutes} minutes.",
        f"Meanwhile cut the {first} and the {second} into small pieces and fry them in the {fat}.",
        f"Mix everything, season with salt, pepper and {herb}, and serve."])


def recipe(pick):
    return pick.one((recipe_soup, recipe_cake, recipe_bowl))(pick)


# ---- slot-value records and their sentence ------------------------------------------------------

RESTAURANTS = ("Blue Lantern", "Golden Goose", "Old Harbour", "Red Fox", "Silver Spoon",
               "Green Table", "Three Pines", "White Horse", "Corner House", "Copper Pot")
CUISINES = "Italian French Indian Japanese Greek Spanish Thai Turkish".split()
CITIES = "Arden Belmont Corvale Dunmore Eastbrook Fairhaven Glenford Harwick Kingsbury Lynfield".split()
AREAS = ("city centre", "riverside", "old town", "station district")
SKIES = (("sunny", "Take a hat."), ("rainy", "Take an umbrella."), ("cloudy", "It will stay dry."),
         ("snowy", "Wear warm boots."), ("stormy", "Stay at home."))
SUBJECTS = "history music painting cooking gardening travel science poetry".split()


def record(slots, sentence):
    return " | ".join(f"{key}: {value}" for key, value in slots) + f"\n=> {sentence}"


def record_restaurant(pick):
    name, other = pick.several(RESTAURANTS, 2)
    food, area, stars = pick.one(CUISINES), pick.one(AREAS), pick.number(1, 5)
    price = pick.one(("cheap", "moderate", "expensive"))
    family = pick.chance(0.5)
    children = "welcomes children" if family else "is not for children"
    kind = f"{with_article(price)} {food} restaurant"
    sentence = pick.one((
        f"The {name} is {kind} in the {area}, near the {other}. It has {plural(stars, 'star')} and "
        f"{children}.",
        f"Near the {other} in the {area} there is {kind} called the {name}. It {children} and has "
        f"{plural(stars, 'star')}."))
    return record((("name", name), ("food", food), ("price", price), ("area", area), ("near", other),
                   ("stars", stars), ("children", "yes" if family else "no")), sentence)


def record_weather(pick):
    city, day = pick.one(CITIES), pick.one(DAYS)
    (sky, advice), high = pick.one(SKIES), pick.number(-5, 32)
    low = high - pick.number(3, 9)
    sentence = pick.one((
        f"On {day} it will be {sky} in {city}, with {low} to {high} degrees. {advice}",
        f"{city} expects {with_article(sky)} {day} between {low} and {high} degrees. {advice}"))
    return record((("city", city), ("day", day), ("sky", sky), ("low", low), ("high", high)), sentence)


def record_train(pick):
    start, end = pick.several(CITIES, 2)
    hour, minute, track = pick.number(5, 22), pick.number(0, 11) * 5, pick.number(1, 12)
    late = pick.one((0, 0, 5, 10, 20))
    delay = f"is {in_words(late)} minutes late" if late else "is on time"
    time = f"{hour}:{minute:02d}"
    sentence = pick.one((
        f"The {time} train from {start} to {end} leaves from track {track} and {delay}.",
        f"The train to {end} {delay}. It leaves {start} at {time} from track {track}."))
    return record((("from", start), ("to", end), ("time", time), ("track", track),
                   ("delay", late)), sentence)


def record_book(pick):
    author = Character(pick)
    subject, pages, year = pick.one(SUBJECTS), pick.number(8, 60) * 10, pick.number(1950, 2025)
    city = pick.one(CITIES)
    sentence = pick.one((
        f"{author.name} of {city} wrote a book about {subject} in {year}. It has {pages} pages.",
        f"The book about {subject} by {author.name} of {city} has {pages} pages and came out in "
        f"{year}."))
    return record((("author", author.name), ("city", city), ("subject", subject), ("pages", pages),
                   ("year", year)), sentence)


def slot_record(pick):
    makers = (record_restaurant, record_restaurant, record_weather, record_train, record_book)
    return "\n".join(pick.one(makers)(pick) for _ in range(pick.number(1, 3)))


# ---- output -------------------------------------------------------------------------------------

KINDS = {"story": story, "arithmetic": arithmetic, "calendar": calendar, "recipe": recipe,
         "record": slot_record}


def generate(seed, num_bytes, kind="all"):
    """Whole documents, each followed by END_OF_DOCUMENT and a newline; at most `num_bytes` bytes.

    With kind "all" the next document is of the kind that has had the fewest bytes so far.
    """
    pick = Picker(seed)
    written = dict.fromkeys(KINDS if kind == "all" else (kind,), 0)
    documents, total = [], 0
    while True:
        next_kind = min(written, key=written.get)
        document = KINDS[next_kind](pick) + END_OF_DOCUMENT + "\n"
        size = len(document.encode())
        if total + size > num_bytes:
            return "".join(documents)
        documents.append(document)
        written[next_kind] += size
        total += size


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="same seed, same text (default 1)")
    parser.add_argument("--bytes", type=int, default=300_000,
                        help="upper bound of the text's size (default 300000)")
    parser.add_argument("--kind", choices=("all", *KINDS), default="all",
                        help="what to write (default all, in equal shares)")
    parser.add_argument("--out", help="file to write (default: standard output)")
    options = parser.parse_args()
    if options.bytes <= 0:
        parser.error("--bytes must be positive")
    text = generate(options.seed, options.bytes, options.kind)
    if options.out:
        with open(options.out, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
