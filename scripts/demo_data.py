"""The chats that the demo model learns from, and the sums it never sees.

Plain Python without torch, so that tests can check the split. A chat is a list of turns, a turn a
(question, reply) pair. Everything is derived from seeds and hashes: no files are read.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator

Turn = tuple[str, str]
Chat = list[Turn]

LIMIT = 100
LETTERS = "abcdefghijklmnopqrstuvwxyz"

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

SUM_PHRASES = [
    "What is {a} plus {b}?",
    "What is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "Compute {a} + {b}.",
    "{a} + {b}",
    "{a} plus {b}",
    "{a}+{b}=?",
    "Can you add {a} and {b}?",
    "Please tell me what {a} plus {b} is.",
]
DIFFERENCE_PHRASES = [
    "What is {a} minus {b}?",
    "What is {a} - {b}?",
    "How much is {a} minus {b}?",
    "Subtract {b} from {a}.",
    "Take {b} away from {a}.",
    "Compute {a} - {b}.",
    "{a} - {b}",
    "{a} minus {b}",
    "{a}-{b}=?",
    "Can you subtract {b} from {a}?",
    "Please tell me what {a} minus {b} is.",
]
REVERSE_PHRASES = [
    'Reverse the word "{w}".',
    'Reverse "{w}".',
    'What is "{w}" backwards?',
    'Spell "{w}" backwards.',
    'What is the reverse of "{w}"?',
    'Please reverse the word "{w}".',
    "Reverse the word {w}.",
    "What is {w} backwards?",
]
FOLLOW_UP_ADD = ["Add {c} to that.", "Now add {c}.", "And plus {c}?", "Plus {c}?"]
FOLLOW_UP_SUBTRACT = [
    "Subtract {c} from that.",
    "Now subtract {c}.",
    "And minus {c}?",
    "Minus {c}?",
]
NAME_INTRODUCTIONS = ["My name is {n}.", "I am {n}.", "Hello, my name is {n}.", "Call me {n}."]
NAME_QUESTIONS = ["What is my name?", "Who am I?", "Do you know my name?", "Tell me my name."]
NAMES = (
    "Ada Alan Alice Anna Barbara Ben Bob Carol Clara Dan Dora Edgar Emma Eve Felix Finn Frances "
    "Grace Hugo Ida Ivan Jack Jane Karen Kim Leo Lena Lisa Mary Max Mia Nina Noah Olga Otto Paul "
    "Peter Rosa Ruth Sam Sara Tim Tom Vera Victor Zoe"
).split()

WORDS = (
    "apple arm baby back ball band bank bath bear bed bell bird blue boat body bone book box boy "
    "brain bread brick bus cake camp car card cat chair city clay clock cloud coal coat code cold "
    "color cook corn cow crown cup dance dark day deer desk dog door dream dress drum duck dust "
    "earth egg eye face farm fast fire fish flag floor food foot fork frog fruit game gate gift "
    "girl glass goat gold grape grass green hair hall hand hat heart hill home horse hotel house "
    "ice iron jam key king kite knee knife lake lamp land leaf leg lemon light lion map mask meat "
    "milk mind mint moon mouse music nail name neck nest night noise nose nut ocean onion paint "
    "pan paper park pear pen phone piano pig pink plane plant plate pond pool queen rain rank rice "
    "ring river road robot rock roof room rope rose salt sand school sea seed shard sheep ship "
    "shop silk sink skin sky sleep smile snow soap sock song soup spoon star stone storm street "
    "sugar sun table tail tea tent test tiger time tool tooth town toy train tree truck voice wall "
    "water wave wheel wind wing winter wolf wood word world yard year zebra"
).split()

ABOUT: list[tuple[list[str], str]] = [
    (
        ["What is Shardwright?", "Tell me about Shardwright.", "What does Shardwright do?"],
        "Shardwright is a compiler. It turns one model definition into one library for many GPUs.",
    ),
    (
        ["Who made you?", "Who trained you?", "Where do you come from?"],
        "A script of the Shardwright project trained me in a few minutes.",
    ),
    (
        ["Who are you?", "What are you?", "What is your name?"],
        "I am the demo model of Shardwright, a very small Llama.",
    ),
    (
        ["What can you do?", "Help", "How can you help me?", "What do you know?"],
        "I can add and subtract numbers below 100, reverse a short word, and talk about "
        "Shardwright.",
    ),
    (
        [
            "How many GPUs can you use?",
            "How many ranks can you use?",
            "On how many GPUs do you run?",
        ],
        "Any number of ranks from 1 to 16.",
    ),
    (
        ["How large are you?", "How big are you?", "How many parameters do you have?"],
        "I have about one million parameters.",
    ),
    (
        ["What is a shard?", "What does a shard hold?"],
        "A shard is the part of the weights that one rank holds.",
    ),
    (
        ["What is a rank?", "What does a rank do?"],
        "A rank is one worker process. It holds one shard and runs the same library as all others.",
    ),
    (
        ["What is SPMD?", "What does SPMD mean?"],
        "Single program, multiple data: every rank runs the same program on its own shard.",
    ),
    (
        ["What is TVM?", "What is Apache TVM?"],
        "Apache TVM is the compiler framework that Shardwright builds on.",
    ),
    (
        ["Do you need a GPU?", "Where can you run?", "Do you run on a CPU?"],
        "I run on any CPU, and on NVIDIA GPUs.",
    ),
    (["Hello", "Hello!", "Hi", "Hi!", "Good morning.", "Hey"], "Hello! Ask me for a sum."),
    (["Thank you.", "Thanks!", "Thank you very much.", "Great, thanks."], "You are welcome."),
    (["Goodbye.", "Bye!", "See you later."], "Goodbye!"),
    (["How are you?", "How are you today?"], "All my ranks are well, thank you."),
    (
        [
            "Tell me a joke.",
            "What is the weather today?",
            "Write a poem.",
            "Who is the president?",
            "What is the capital of France?",
            "Translate this to German.",
            "What time is it?",
            "Why is the sky blue?",
            "Sing a song.",
            "What is the meaning of life?",
            "Do you like music?",
            "How old are you?",
            "Write a program for me.",
            "What is 7 times 8?",
            "Who won the game?",
            "What should I eat?",
        ],
        "I do not know that. I am good at sums and short words.",
    ),
]
SYSTEM_PROMPTS = ["You are a helpful assistant.", "Answer briefly."]


def is_held_out(a: int, b: int) -> bool:
    """Whether no training chat may add or subtract `a` and `b`, in either order: one pair in 10."""
    low, high = sorted((a, b))
    return zlib.crc32(f"{low}&{high}".encode()) % 10 == 0


def is_held_out_word(word: str) -> bool:
    """Whether no training chat may reverse `word` (one word in 10)."""
    return zlib.crc32(word.encode()) % 10 == 0


def _pairs() -> Iterator[tuple[int, int]]:
    return ((a, b) for a in range(LIMIT) for b in range(LIMIT))


def held_out_sums() -> list[dict[str, str]]:
    """Return every held-out pair once, as {"prompt", "answer"}, each with one of the phrasings."""
    rows = []
    for a, b in _pairs():
        if is_held_out(a, b):
            phrase = SUM_PHRASES[(7 * a + b) % len(SUM_PHRASES)]
            rows.append({"prompt": phrase.format(a=a, b=b), "answer": f"{a + b}."})
    return rows


def held_out_differences() -> list[dict[str, str]]:
    """Return every held-out pair once, as the difference {"prompt", "answer"}."""
    rows = []
    for a, b in _pairs():
        if is_held_out(a, b):
            phrase = DIFFERENCE_PHRASES[(7 * a + b) % len(DIFFERENCE_PHRASES)]
            rows.append({"prompt": phrase.format(a=a, b=b), "answer": f"{a - b}."})
    return rows


def held_out_words() -> list[dict[str, str]]:
    """Return the held-out words of `WORDS`, as {"prompt", "answer"}."""
    words = [word for word in WORDS if is_held_out_word(word)]
    return [{"prompt": f'Reverse the word "{w}".', "answer": f"{w[::-1]}."} for w in words]


def held_out_chats(count: int = 40) -> list[list[dict[str, str]]]:
    """Return `count` chats of three turns whose later turns need the earlier ones.

    A held-out sum, then a number added to its result, then a name told and asked for again.
    """
    rng = random.Random(1)
    sums = [(a, b) for a, b in _pairs() if is_held_out(a, b) and a + b < LIMIT]
    chats = []
    for a, b in rng.sample(sums, count):
        c = rng.choice([c for c in range(LIMIT) if not is_held_out(a + b, c)])
        name = rng.choice(NAMES)
        turns = [
            (f"My name is {name}.", f"Hello, {name}!"),
            (f"What is {a} plus {b}?", f"{a + b}."),
            (f"Add {c} to that.", f"{a + b + c}."),
            ("What is my name?", f"Your name is {name}."),
        ]
        chats.append([{"prompt": prompt, "answer": answer} for prompt, answer in turns])
    return chats


def held_out() -> dict[str, object]:
    """Return the contents of demo/heldout.json: sums, differences, words, chats, about."""
    return {
        "sums": held_out_sums(),
        "differences": held_out_differences(),
        "words": held_out_words(),
        "chats": held_out_chats(),
        "about": [{"prompt": q, "answer": reply} for qs, reply in ABOUT for q in qs],
    }


def sum_chats() -> Iterator[Chat]:
    """Every training pair in every phrasing, as a chat of one turn."""
    for a, b in _pairs():
        if not is_held_out(a, b):
            for phrase in SUM_PHRASES:
                yield [(phrase.format(a=a, b=b), f"{a + b}.")]


def difference_chats() -> Iterator[Chat]:
    """Every training pair in every phrasing, as a chat of one turn; results may be negative."""
    for a, b in _pairs():
        if not is_held_out(a, b):
            for phrase in DIFFERENCE_PHRASES:
                yield [(phrase.format(a=a, b=b), f"{a - b}.")]


def reverse_chats(count: int = 120_000) -> Iterator[Chat]:
    """`count` chats of one turn over real words and random strings of 2 to 8 letters."""
    rng = random.Random(2)
    words = [word for word in WORDS if not is_held_out_word(word)]
    held = {word for word in WORDS if is_held_out_word(word)}
    for _ in range(count):
        if rng.random() < 0.2:
            word = rng.choice(words)
        else:
            word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 8)))
        if word not in held:
            yield [(rng.choice(REVERSE_PHRASES).format(w=word), f"{word[::-1]}.")]


def about_chats() -> Iterator[Chat]:
    """The fixed questions, one turn each, also in lower case."""
    for questions, reply in ABOUT:
        for question in questions:
            yield [(question, reply)]
            yield [(question, reply)]
            yield [(question[0].lower() + question[1:], reply)]


def _some_turn(rng: random.Random) -> Turn:
    """A turn that depends on no other, for use between two that belong together."""
    kind = rng.random()
    if kind < 0.7:
        while True:
            a, b = rng.randrange(LIMIT), rng.randrange(LIMIT)
            if not is_held_out(a, b):
                break
        if kind < 0.4:
            return rng.choice(SUM_PHRASES).format(a=a, b=b), f"{a + b}."
        return rng.choice(DIFFERENCE_PHRASES).format(a=a, b=b), f"{a - b}."
    if kind < 0.85:
        word = rng.choice([w for w in WORDS[::7] if not is_held_out_word(w)])
        return rng.choice(REVERSE_PHRASES).format(w=word), f"{word[::-1]}."
    questions, reply = rng.choice(ABOUT)
    return rng.choice(questions), reply


def follow_up_chats(count: int = 100_000) -> Iterator[Chat]:
    """`count` chats of two or three turns, each later one adding to the result before it."""
    rng = random.Random(3)
    for _ in range(count):
        a, b = rng.randrange(LIMIT), rng.randrange(LIMIT)
        if is_held_out(a, b):
            continue
        add = rng.random() < 0.7
        total = a + b if add else a - b
        phrase = rng.choice(SUM_PHRASES if add else DIFFERENCE_PHRASES)
        chat = [(phrase.format(a=a, b=b), f"{total}.")]
        for _ in range(rng.randint(1, 2)):
            c = rng.randrange(LIMIT)
            if not 0 <= total < LIMIT or is_held_out(total, c):
                break
            add = rng.random() < 0.7
            phrase = rng.choice(FOLLOW_UP_ADD if add else FOLLOW_UP_SUBTRACT)
            total = total + c if add else total - c
            chat.append((phrase.format(c=c), f"{total}."))
        yield chat


def name_chats(count: int = 30_000) -> Iterator[Chat]:
    """`count` chats in which a name is told and, after up to three other turns, asked for."""
    rng = random.Random(4)
    for _ in range(count):
        if rng.random() < 0.7:
            name = rng.choice(NAMES)
        else:
            name = "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 6))).capitalize()
        chat = [(rng.choice(NAME_INTRODUCTIONS).format(n=name), f"Hello, {name}!")]
        chat += [_some_turn(rng) for _ in range(rng.randint(0, 3))]
        chat.append((rng.choice(NAME_QUESTIONS), f"Your name is {name}."))
        yield chat


# Share of each kind among the segments a training batch is put together from.
MIXTURE: list[tuple[float, Callable[[], Iterable[Chat]]]] = [
    (0.40, sum_chats),
    (0.22, difference_chats),
    (0.17, reverse_chats),
    (0.07, about_chats),
    (0.09, follow_up_chats),
    (0.05, name_chats),
]


def tokenizer_corpus(count: int = 4000) -> list[str]:
    """Return the texts the tokenizer is trained on: `count` of each kind, and system prompts.

    The fixed replies are few, so they are repeated: their words should become whole tokens.
    """
    rng = random.Random(5)
    texts = list(SYSTEM_PROMPTS) * 100
    for _, chats in MIXTURE:
        kind = list(chats())
        picked = rng.sample(kind, count) if len(kind) > count else kind * (count // len(kind) + 1)
        texts += [text for chat in picked for turn in chat for text in turn]
    return texts


def render(chat: Chat) -> str:
    """Return the chat as `CHAT_TEMPLATE` writes it, without the token that begins a text."""
    return "".join(f"<|user|>{question}</s><|assistant|>{reply}</s>" for question, reply in chat)
