"""Generated tasks: recall, copying, questions, spelling, sums, small talk. Unlimited and seeded.

Each generator returns segments (text or token ids, weight of the loss on them). Random keys, values and facts
have weight 0 (they cannot be predicted), answers weight 2 (those of recall `recall_weight`), everything else 1.
Training and held-out evaluation draw names from disjoint syllable sets and values from disjoint seeds.
"""

import random
import re

BAR, JOIN = "\uff5c", "\u2581"
USER, ASSISTANT = f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"
BOS_ID, EOS_ID = 0, 1

SYLLABLES = {
    "train": ("ba be bi bo bra da de do dra el en fa fe fi ga go gra ha he hi ka ke kin la le lin lo ma me mi mo na "
              "ne ni no or pa pe ra re ri ro sa se si so ta te ti to va ve vi zan").split(),
    "heldout": ("ul ur quo wex yam pli snu thu glu fro chi sho cle blu kru wyn jud nux gim tof vyl zek bup dunk hob jep "
                "lum mux pof rud").split(),
}
HELD_OUT_NAME = re.compile("(?:" + "|".join(SYLLABLES["heldout"]) + ")+")
HELD_OUT_ADJECTIVES = "purple ancient broken eastern western lonely narrow hidden".split()
HELD_OUT_PLACES = "lighthouse meadow fountain cottage abbey canyon chapel quarry".split()
ONSETS = "b c d f g h j k l m n p r s t v w y z br ch cl cr dr fl fr gr pl pr qu sh sl sn st th tr tw".split()
NUCLEI = "a e i o u ai ea ee oo ou y".split()
CODAS = ["", "", "", "l", "n", "r", "s", "t", "d", "k", "m", "p", "x", "ck", "ng", "st", "rn", "lm"]
ADJECTIVES = "old new red blue green grey white silver golden quiet distant little great north south".split()
PLACES = "harbour mill bridge tower garden forest market station castle river valley temple island road inn".split()
ATTRIBUTES = ["code", "password", "number", "secret word", "colour", "key", "name", "symbol"]
COLOURS = "red blue green yellow black white orange purple brown pink".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def unpronounceable(rng):
    """Letters in any order, some syllables twice: what follows a letter can only be known by looking it up."""
    parts = ["".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.3:
        parts.append(rng.choice(parts))
    return "".join(parts)


def invented(rng, split):
    """A name that does not exist. Training also draws from far more sounds and from letters in any order, but never a
    name that the held-out syllables could form."""
    kind = rng.random() if split == "train" else 1.0
    while kind < 0.75:
        name = unpronounceable(rng) if kind < 0.4 else "".join(
            rng.choice(ONSETS) + rng.choice(NUCLEI) + rng.choice(CODAS) for _ in range(rng.randint(1, 3)))
        if HELD_OUT_NAME.fullmatch(name) is None:
            return name
    return "".join(rng.choice(SYLLABLES[split]) for _ in range(rng.randint(2, 4)))


class Tasks:
    """Draws tasks for one split. `prose(n, rng)` gives n token ids of running text as filler; `glosses` is a list
    of (noun, definition)."""

    def __init__(self, seed, split, encode, prose, glosses, recall_share=0.22, recall_weight=2):
        self.recall_share, self.recall_weight = recall_share, recall_weight
        self.rng = random.Random(f"{split}-{seed}")
        self.split, self.encode, self.prose = split, encode, prose
        # Held-out nouns are the last tenth of the list.
        cut = len(glosses) * 9 // 10
        self.glosses = glosses[:cut] if split == "train" else glosses[cut:]
        self.held_out_nouns = {noun for noun, _ in glosses[cut:]}
        self.full_stop = encode(".")[0]

    def key(self):
        while True:
            key = self.any_key()
            if self.allowed(key):
                return key

    def allowed(self, key):
        """Training never asks for a key that held-out prompts could ask for, and the other way round."""
        words = key.lower().split()
        held_out = (HELD_OUT_NAME.fullmatch(words[-1]) is not None or words[-1] in self.held_out_nouns
                    or words[-1] in HELD_OUT_PLACES or words[0] in HELD_OUT_ADJECTIVES)
        return held_out if self.split != "train" else not held_out

    def any_key(self):
        r = self.rng
        kind = r.random()
        if kind < 0.5:
            name = invented(r, self.split)
            return name.capitalize() if r.random() < 0.5 else name
        if kind < 0.75:
            return r.choice(self.glosses)[0]
        train = self.split == "train"
        first = r.choice(ADJECTIVES if train else HELD_OUT_ADJECTIVES)
        if r.random() < 0.5:
            return f"{first} {r.choice(PLACES if train else HELD_OUT_PLACES)}"
        name = invented(r, self.split)
        return f"{first} {name.capitalize() if r.random() < 0.5 else name}"

    def value(self):
        r = self.rng
        kind = r.random()
        if kind < 0.5:
            shortest, longest = (2, 8) if self.split == "train" else (3, 6)
            return "".join(r.choice("0123456789") for _ in range(r.randint(shortest, longest)))
        if kind < 0.75:
            return invented(r, self.split)
        return r.choice(self.glosses)[0] if kind < 0.9 else r.choice(COLOURS)

    def recall(self, tokens, questions=None, depth=None, absent=0.05):
        """At most about `tokens` tokens: facts among prose, then questions, answered in full sentences. With `depth`
        in [0, 1] there is one question, its fact lies at that depth of the prose and is not overwritten; with None
        everything is drawn. Returns (segments, answers)."""
        r = self.rng
        questions = questions or r.randint(1, 16)
        questions = max(1, min(questions, tokens // 90))
        budget = max(tokens - 30 - 36 * questions, 20)
        facts = max(1, min(r.randint(2, 40), budget // 22))
        attribute = r.choice(ATTRIBUTES)
        keys = []
        while len(keys) < facts:
            key = self.key()
            if keys and r.random() < 0.3 and " " not in keys[-1]:
                key = keys[-1][:-1] + r.choice("aeiou")  # a decoy: nearly the same name
                if not self.allowed(key):
                    continue
            if key not in keys:
                keys.append(key)
        values = {key: self.value() for key in keys}
        sentences = [(key, f" The {attribute} of {key} is {values[key]}.") for key in keys]
        if facts > 2 and depth is None and r.random() < 0.1:  # overwritten: the last one holds
            key = r.choice(keys[:-1])
            values[key] = self.value()
            sentences.append((key, f" Now the {attribute} of {key} is {values[key]}."))
        encoded = [self.encode(s) for _, s in sentences]
        filler = max(0, budget - sum(map(len, encoded)))
        cuts = sorted(r.random() for _ in encoded)
        if depth is not None:
            cuts = sorted(r.random() for _ in encoded[1:])
            asked_index = sum(c < depth for c in cuts)
            cuts.insert(asked_index, depth)
        segments = [([BOS_ID], 0), (USER, 1)]
        if r.random() < 0.7:
            segments.append((f"Remember the {attribute} of each one.", 1))
        text = self.prose(filler, r) if filler >= 16 else []
        at = 0
        for cut, ids in zip(cuts, encoded):
            to = int(cut * len(text))
            end = min(to + 24, len(text))
            while 0 < to < end and text[to - 1] != self.full_stop:  # between sentences, if one ends nearby
                to += 1
            if to > at:
                segments.append((text[at:to], 1))
                at = to
            segments.append((ids, 0))
        if at < len(text):
            segments.append((text[at:], 1))
        first = "\n"
        if depth is None and r.random() < 0.2:  # told in one turn, asked in the next
            segments += [(ASSISTANT, 1), ("I will remember.", 1), ([EOS_ID], 1), (USER, 1)]
            first = ""
        answers = []
        for q in range(questions):
            key = sentences[asked_index][0] if depth is not None else r.choice(keys)
            answer = f"The {attribute} of {key} is {values[key]}."
            if depth is None and r.random() < absent:
                key = self.key()
                if key not in values:
                    answer = "I do not know."
                else:
                    answer = f"The {attribute} of {key} is {values[key]}."
            if q:
                segments.append((USER, 0))
            # The name asked for cannot be guessed; the frame around it can.
            segments += [(f"{first if q == 0 else ''}What is the {attribute} of", 1), (f" {key}", 0), ("?", 1),
                         (ASSISTANT, 1), (answer, self.recall_weight), ([EOS_ID], self.recall_weight)]
            answers.append(answer)
        return segments, answers

    def chat(self, question, answer):
        return [([BOS_ID], 0), (USER, 1), (question, 0.5), (ASSISTANT, 1), (answer, 2), ([EOS_ID], 2)]

    def copying(self):
        r = self.rng
        kind = r.random()
        if kind < 0.4:
            run = [r.randrange(260, 4000) for _ in range(r.randint(8, 60))]
            return [([BOS_ID], 0), (run, 0), (run, 2), (run[:r.randint(2, len(run))], 2), ([EOS_ID], 0)]
        if kind < 0.7:
            words = " ".join(r.choice((self.key, self.value))() for _ in range(r.randint(3, 12)))
            return self.chat(f'Repeat: "{words}"', words)
        text = self.prose(r.randint(10, 50), r)
        return [([BOS_ID], 0), (USER, 1), ("Repeat this text:\n", 1), (text, 0), (ASSISTANT, 1), (text, 2), ([EOS_ID], 2)]

    def glossary(self):
        r = self.rng
        noun, gloss = r.choice(self.glosses)
        kind = r.random()
        article = "an" if noun[0] in "aeiou" else "a"
        if kind < 0.4:
            return self.chat(f"What is {article} {noun}?", gloss[0].upper() + gloss[1:] + ".")
        picked = r.sample(self.glosses, r.randint(3, 5))
        lines = "\n".join(f"{n}: {g}" for n, g in picked)
        noun, gloss = r.choice(picked)
        if kind < 0.7:
            return self.chat(f"{lines}\nWhich word means: {gloss}?", f"{noun}.")
        return self.chat(f"{lines}\nWhat does {noun} mean?", gloss + ".")

    def spelling(self):
        r = self.rng
        word = r.choice(self.glosses)[0] if r.random() < 0.6 else invented(r, self.split)
        word = word.split()[0]
        kind = r.randrange(4)
        if kind == 0:
            return self.chat(f"Spell {word}.", "-".join(word) + ".")
        if kind == 1:
            return self.chat(f"What is the first letter of {word}?", word[0] + ".")
        if kind == 2:
            return self.chat(f"What is the last letter of {word}?", word[-1] + ".")
        return self.chat(f"How many letters are in {word}?", f"{'-'.join(word)}: {len(word)}.")

    def sums(self):
        r = self.rng
        a, b = r.randint(0, 99), r.randint(0, 99)
        if r.random() < 0.5:
            return self.chat(f"What is {a} + {b}?", f"{a + b}.")
        a, b = max(a, b), min(a, b)
        return self.chat(f"What is {a} - {b}?", f"{a - b}.")

    def small_talk(self):
        r = self.rng
        kind = r.random()
        if kind < 0.35:
            question = r.choice(["Who are you?", "What are you?", "What is your name?", "Hello! Who is this?"])
            return self.chat(question, "I am Moebius, a very small language model. I can continue a story and remember "
                                       "what you tell me.")
        if kind < 0.5:
            return self.chat(r.choice(["Hello!", "Hi.", "Good morning.", "Good evening."]),
                             "Hello! What would you like to talk about?")
        if kind < 0.6:
            return self.chat(r.choice(["Thank you.", "Thanks!", "Thank you very much."]), "You are welcome.")
        text = self.prose(r.randint(60, 240), r)
        cut = r.randint(10, 40)
        return [([BOS_ID], 0), (USER, 1), ("Continue this story:\n", 1), (text[:cut], 1), (ASSISTANT, 1), (text[cut:], 1),
                ([EOS_ID], 0)]

    def draw(self, longest, room, first):
        """One task of at most `room` tokens as a list of (ids, weight). `longest` bounds the recall prompts; the first
        task of a row is often a long one, so that every distance up to the window is seen."""
        r = self.rng
        if room < 80:
            return [(self.prose(room, r), 1)]
        most = min(longest, room)
        kind = r.random()
        if first and kind < 0.6:
            segments = self.recall(r.randint(most // 4, most))[0]
        elif r.random() < self.recall_share:
            segments = self.recall(int(60 * (most / 60) ** r.random()))[0]
        elif (kind := r.random()) < 0.36:
            segments = self.copying()
        elif kind < 0.62:
            segments = self.glossary()
        elif kind < 0.74:
            segments = self.spelling()
        elif kind < 0.94:
            segments = self.sums()
        else:
            segments = self.small_talk()
        return self.ids(segments)

    def ids(self, segments):
        return [(self.encode(s) if isinstance(s, str) else s, w) for s, w in segments]
