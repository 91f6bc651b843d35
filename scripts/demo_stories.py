"""Little stories: two animals, one of five plots, an ending."""

from demo_english import ANIMALS, DAYS, Character, capital, in_words, with_article

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
