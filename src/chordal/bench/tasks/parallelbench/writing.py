"""Five writing tasks: a sentence of given words (easy, medium, hard), a summary, a paraphrase.

ParallelBench grades them by LanguageTool, which needs Java and a download, and the paraphrase by
BERTScore too. Here `is_well_formed` stands for the first: a short list of marks that good English never
has and that committing tokens in parallel leaves behind. It is no grammar checker. Instead of
BERTScore a paraphrase must keep the names and numbers of the sentence. ROUGE-L and BLEU are as
published. Conversations and sentences come from a small grammar of our own.
"""

from __future__ import annotations

import itertools
import random
import re

from chordal.bench.tasks.parallelbench.names import FIRST
from chordal.bench.tasks.parallelbench.overlap import bleu, rouge_l, words
from chordal.bench.tasks.task import Grade, Instance, Task

NUM_WORDS = 4
MIN_SUMMARY = 5

# Words of one scene, which belong together.
EASY = [
    theme.split()
    for theme in (
        "dog park ball run leash tree grass bark",
        "sun beach water sand wave towel swim shell",
        "kitchen soup spoon pot cook salt table dinner",
        "school teacher book pencil desk lesson read class",
        "garden flower rain seed grow soil bee green",
        "car road drive wheel map trip fuel night",
        "winter snow coat cold sled hill ice gloves",
        "cat sofa sleep window milk purr warm mouse",
        "train station ticket seat travel bag late platform",
        "music piano song sing stage dance band listen",
        "farm cow barn hay milk field horse fence",
        "store buy bread money bag price milk shop",
        "baby crib blanket cry bottle smile toy sleep",
        "doctor nurse hospital sick medicine bed help heal",
        "boat lake fish river net row wind sail",
        "birthday cake candle gift friend party balloon wish",
    )
]

# Everyday words that need not belong together.
MEDIUM = (
    "anchor balance bridge candle captain carpet ceiling chapter climate copper courage curtain deadline "
    "debate decade desert diamond distance echo engine envelope fabric factory feather formula fortune "
    "gallery harbor helmet hesitate horizon island journey kettle ladder laughter lantern lesson library "
    "magnet marathon market memory mirror mountain narrow needle neighbor opinion orchard oxygen passport "
    "patience pattern pepper pilot pocket promise puzzle recipe rescue rhythm rumor saddle shadow silence "
    "silver statue strategy summit sweater telescope theater thunder ticket traffic treasure tunnel "
    "umbrella vacuum velvet village violin volcano voyage whisper witness"
).split()

# Rare or abstract words that seldom meet.
HARD = (
    "algorithm ambiguity anachronism apathy archipelago axiom bureaucracy calibrate cartographer catalyst "
    "chrysalis cipher conundrum cryptic dialect dichotomy dissonance dogma ellipse enigma entropy ephemeral "
    "epiphany equinox erosion facade filament fjord fractal gargoyle glacier gravity harbinger heuristic "
    "hubris idiom inertia isotope juxtapose kaleidoscope labyrinth lattice lexicon lichen liturgy magma "
    "mandate metaphor mirage monolith moss nebula neuron nomad oblique obsidian omen osmosis palindrome "
    "paradox parchment pendulum permafrost perplex plankton prism quarantine quasar quorum relic "
    "renaissance satire schism sediment sextant solstice sonnet spartan symphony synapse tangent tapestry "
    "tundra turbine utopia vertigo vortex wavelength zeitgeist zenith"
).split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = (
    "the library",
    "the old mill",
    "the train station",
    "the market",
    "the sports hall",
    "the harbor",
    "the cinema",
    "the town hall",
    "the museum",
    "the swimming pool",
    "the post office",
    "the city park",
)
ACTIVITIES = (
    "have lunch",
    "play chess",
    "study for the exam",
    "practice the speech",
    "go for a run",
    "rehearse the play",
    "repair the bike",
    "watch the match",
    "plan the trip",
    "choose a present for the teacher",
)
EVENTS = (
    "birthday party",
    "school play",
    "camping trip",
    "garden party",
    "family reunion",
    "office party",
    "winter fair",
    "chess tournament",
)
THINGS = (
    "tent",
    "drill",
    "camera",
    "ladder",
    "suitcase",
    "projector",
    "guitar",
    "blender",
    "folding table",
    "bike pump",
    "coffee machine",
    "sleeping bag",
)


def sentence_prompt(given: list[str]) -> str:
    """Ask for a sentence with these words."""
    listed = " and ".join([", ".join(given[:-1]), given[-1]] if given[1:] else given)
    return f"Write one sentence that makes sense and uses the word{'s' if given[1:] else ''} {listed}."


def summary_prompt(conversation: str) -> str:
    """Ask for a summary of a conversation."""
    return f"Summarize this conversation. Reply with the summary only.\n\n{conversation}\n\nSummary:"


def paraphrase_prompt(sentence: str) -> str:
    """Ask to say a sentence in other words."""
    return (
        "Say this sentence in other words. Keep names and numbers. Reply with the new sentence only.\n\n"
        f"Sentence: {sentence}\n\nParaphrase:"
    )


def _easy(rng: random.Random) -> Instance:
    return _sentence("pb_words_easy", rng.sample(rng.choice(EASY), NUM_WORDS))


def _medium(rng: random.Random) -> Instance:
    return _sentence("pb_words_medium", rng.sample(MEDIUM, NUM_WORDS))


def _hard(rng: random.Random) -> Instance:
    return _sentence("pb_words_hard", rng.sample(HARD, NUM_WORDS))


def _sentence(task: str, given: list[str]) -> Instance:
    return Instance(task, sentence_prompt(given), "", {"words": tuple(given)})


def _summary(rng: random.Random) -> Instance:
    (one, other), day, hour = rng.sample(FIRST, 2), rng.choice(DAYS), rng.randint(2, 8)
    place, activity = rng.choice(PLACES), rng.choice(ACTIVITIES)
    thing, event = rng.choice(THINGS), rng.choice(EVENTS)
    if rng.random() < 0.5:
        lines = [
            (one, rng.choice((f"Hi {other}!", f"Hey {other}, how are you?", "Are you there?"))),
            (other, rng.choice(("Hi! What's up?", "Hello! All well here.", "Yes, just got home."))),
            (one, f"Do you want to {activity} on {day}?"),
            (other, rng.choice(("Sure, I'd love to.", "Good idea.", "Yes, I am free then.")) + " Where?"),
            (one, f"Let's meet at {place}, at {hour}."),
            (other, rng.choice(("Perfect, see you there!", "Great, I'll be there.", "Done. See you!"))),
        ]
        answer = f"{one} and {other} will meet at {place} on {day} at {hour} to {activity}."
        keys = (one, other, place.removeprefix("the "), day, str(hour))
    else:
        until = rng.choice([other_day for other_day in DAYS if other_day != day])
        lines = [
            (one, rng.choice((f"{other}, do you still have", f"Hi {other}, do you own")) + f" a {thing}?"),
            (other, rng.choice(("I do, why?", "Yes. Do you need it?", "Somewhere in the cellar, yes."))),
            (one, f"I'd need it for the {event} on {day}. Could I borrow it?"),
            (other, f"No problem, but I need it back by {until}."),
            (one, rng.choice(("Of course!", "You'll have it.", "I promise.")) + " When can I get it?"),
            (other, f"Come by tonight at {hour}."),
        ]
        answer = (
            f"{one} will borrow the {thing} of {other} for the {event} on {day} and return it by {until}."
        )
        keys = (one, other, thing, day, until)
    conversation = "\n".join(f"{speaker}: {line}" for speaker, line in lines)
    facts = {"text": conversation, "keys": keys}
    return Instance("pb_summary", summary_prompt(conversation), answer, facts)


def _paraphrase(rng: random.Random) -> Instance:
    (one, other), day, number = rng.sample(FIRST, 2), rng.choice(DAYS), rng.randint(2, 40)
    place, activity, thing = rng.choice(PLACES), rng.choice(ACTIVITIES), rng.choice(THINGS)
    sentence = rng.choice(
        (
            f"Because the bus was {number} minutes late, {one} could not {activity} with {other} on {day}.",
            f"Last {day}, {one} sold the broken {thing} to {other} for only {number} dollars.",
            f"It takes {one} about {number} minutes to walk from {place} to the house of {other}.",
            f"Before {one} could say a word, {other} had already bought {number} tickets for {day}.",
            f"The {thing} that {one} borrowed from {other} must be returned within {number} days.",
            f"Although {place} is closed on {day}, {number} people were waiting there for {one} and {other}.",
            f"Every {day}, {one} and {other} {activity} near {place} for at least {number} minutes.",
            f"When {one} was {number} years old, the family of {other} moved to a flat close to {place}.",
        )
    )
    return Instance("pb_paraphrase", paraphrase_prompt(sentence), "", {"text": sentence})


_ENDS = re.compile(r"[.!?][\"')\]\u201d\u2019]*$")
_STARTS = re.compile(r"[\"'(\[\u201c\u2018]*[^\W_a-z]")
_BROKEN = re.compile(
    r"""\s[,.;:!?](?:\s|$)      # space before a mark
      | [,;:][,.;:!?]           # one mark too many
      | (?<!\.)\.\.(?!\.) | \.,
      | [,;!?][^\W\d_]          # no space behind one
      | <\|?\w+\|?> | \[\w*MASK\w*\] | \ufffd  # tokens that are no text
    """,
    re.VERBOSE,
)
_DOUBLES = {"had", "that"}  # "she had had enough", "he knew that that was it"


def is_well_formed(text: str) -> bool:
    """Tell whether a text is free of marks of broken English that need no grammar to be seen.

    It starts with a capital letter or a digit and ends with a full stop, exclamation or question mark; no
    word stands twice in a row; punctuation is spaced as usual and never doubled; brackets and double
    quotes come in pairs; no special token is left. Wrong grammar otherwise passes.
    """
    text = text.strip()
    found = words(text)
    return bool(
        _STARTS.match(text)
        and _ENDS.search(text)
        and not _BROKEN.search(text)
        and not any(a == b and a not in _DOUBLES for a, b in itertools.pairwise(found))
        and all(text.count(a) == text.count(b) for a, b in ("()", "[]", "\u201c\u201d"))
        and text.count('"') % 2 == 0
    )


def grade_words(instance: Instance, text: str) -> Grade:
    """Grade a sentence: every word is in it, by letter case and maybe inside another, and it is well formed.

    Strictly each stands as a word of its own, in either case, and there is one line.
    """
    given = instance.facts["words"]
    right = all(word in text for word in given) and is_well_formed(text)
    strict = right and "\n" not in text.strip() and set(given) <= {*words(text)}
    return Grade(right, float(right), strict)


def grade_summary(instance: Instance, text: str) -> Grade:
    """Grade a summary: well formed, five words at least, and fewer than the conversation.

    Score: ROUGE-L to the reference. That the summary is true, no rule here can tell.

    Strictly it also names who, what, where and when, as far as that is known of the conversation.
    """
    length, most = len(words(text)), len(words(instance.facts["text"]))
    right = is_well_formed(text) and MIN_SUMMARY <= length < most
    said = text.lower()
    strict = right and all(key.lower() in said for key in instance.facts["keys"])
    return Grade(right, right * rouge_l(text, instance.answer), strict)


def grade_paraphrase(instance: Instance, text: str) -> Grade:
    """Grade a paraphrase: other words, well formed, all names and numbers kept, half to twice as long.

    Score: 1 - BLEU to the sentence, so that a copy has 0. Strictly it is one line.
    """
    sentence = instance.facts["text"]
    ours, theirs = words(text), words(sentence)
    right = (
        is_well_formed(text)
        and ours != theirs
        and len(theirs) <= 2 * len(ours) <= 4 * len(theirs)
        and anchors(sentence) <= {*ours}
    )
    return Grade(right, right * (1 - bleu(text, sentence)), right and "\n" not in text.strip())


def anchors(sentence: str) -> set[str]:
    """Find what a paraphrase cannot say otherwise: numbers, and capitalized words that do not open it."""
    found = re.findall(r"(?<=[\w,;:'\u2019] )[A-Z][^\W_]+|\d+", sentence)
    return {word.lower() for word in found}


TASKS = (
    Task("pb_words_easy", "parallelbench", 64, _easy, grade_words, free=True),
    Task("pb_words_medium", "parallelbench", 64, _medium, grade_words, free=True),
    Task("pb_words_hard", "parallelbench", 64, _hard, grade_words, free=True),
    Task("pb_summary", "parallelbench", 64, _summary, grade_summary, free=True),
    Task("pb_paraphrase", "parallelbench", 64, _paraphrase, grade_paraphrase, free=True),
)
