"""Train `tiny`, the small Llama that ships inside plait.

Everything it needs is at hand: the text is the running interpreter's own standard library, plus
questions and answers made from that library's docstrings, so nothing is downloaded.

    OMP_WAIT_POLICY=passive nice python tools/train_tiny.py --tokens 12288000 --resume /tmp/tiny-train

(Passive, because threads that spin at barriers starve one another on a machine that others use too.)
The result depends on the interpreter's version, `--tokens` and `--seed`, and on no clock: the
schedule counts tokens, and each step draws its windows from a generator seeded with
(seed, step). A run that was stopped and resumed therefore sees the same data as one that was not.

The file reads from top to bottom as the work is done: corpus, chat, tokenizer, training,
evaluation, publication.
"""

import argparse
import ast
import builtins
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parent.parent

VOCAB = 2048
CONTEXT_TOKENS = 1024
SPECIALS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
END_OF_TEXT, END_OF_TURN = 0, 4  # ids: the trainer numbers the specials first, in order

STEP_TOKENS = 8192  # 16 windows of 512, or 8 of 1024
SHORT_WINDOW_TOKENS, LONG_WINDOW_TOKENS = 512, CONTEXT_TOKENS
LONG_WINDOWS_FROM = 0.85  # fraction of the steps; positions up to 1024 must have been trained
PEAK_RATE, LAST_RATE_FRACTION, FLAT_UNTIL, WARM_UP_STEPS = 2e-3, 0.02, 0.70, 50
WEIGHT_DECAY, CLIP_NORM = 0.1, 1.0
CHECKPOINT_EVERY_S = 180.0
LOG_EVERY_STEPS = 20


# ---------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of the standard library; `path` is relative to the library's root."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """One file in twenty, chosen by its name alone, so that the choice never moves."""
        return int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % 20 == 0

    @property
    def module(self) -> str:
        """The name under which people import this file: `posixpath.py` is `os.path`."""
        name = self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if name.startswith("asyncio."):
            return "asyncio"
        return RENAMED.get(name) or PARTS.get(name) or name

    @property
    def is_part(self) -> bool:
        """Whether the file is only one of those that make up `module`, so not documented by its docstring."""
        name = self.path.removesuffix(".py").replace("/", ".")
        return name in PARTS or (name.startswith("asyncio.") and not name.endswith(".__init__"))


RENAMED = {"posixpath": "os.path", "_pydecimal": "decimal", "_collections_abc": "collections.abc"}
PARTS = {
    "genericpath": "os.path",
    "_pyio": "io",
    "json.encoder": "json",
    "json.decoder": "json",
    "concurrent.futures.thread": "concurrent.futures",
    "concurrent.futures.process": "concurrent.futures",
    "unittest.case": "unittest",
    "unittest.suite": "unittest",
    "unittest.loader": "unittest",
    "unittest.result": "unittest",
    "unittest.runner": "unittest",
}


def read_library() -> list[SourceFile]:
    """The standard library without tests and applications, in the order of the paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[SourceFile] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(p in ("site-packages", "idlelib", "lib2to3") or p.startswith("test") for p in parts):
            continue
        # Build settings: they differ from machine to machine and hold its paths.
        if parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        files.append(SourceFile(path="/".join(parts), text=text))
    return files


# ------------------------------------------------------------------------------------------ chat


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A documented module, class or function: what a question can be about."""

    name: str  # full: "os.path.join"
    kind: str  # "module", "class" or "function"
    about: str  # the docstring's first paragraph, on one line
    signature: str | None  # "os.path.join(a, *p)"

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2]


LONGEST_ANSWER_CHARACTERS = 360


def first_paragraph(docstring: str | None, short_name: str) -> str | None:
    """The first paragraph that is prose, on one line and cut at a sentence; None if there is none."""
    for paragraph in inspect.cleandoc(docstring or "").split("\n\n"):
        line = " ".join(paragraph.split()).replace("``", "`")
        line = re.sub(r"^" + re.escape(short_name) + r"\(.*?\)\s*(->\s*[\w. ]+?)?\s*(--(?!>)|:)\s*", "", line)
        code = (short_name + "(", ">>>", "==", "--", "Usage:", "class ", "def ")
        if len(line) < 8 or line.startswith(code) or line.endswith(":"):
            continue
        while len(line) > LONGEST_ANSWER_CHARACTERS or line.endswith(("e.g.", "i.e.")):
            line, stop, _ = line[: min(LONGEST_ANSWER_CHARACTERS, len(line) - 1)].rpartition(". ")
            if not stop:
                return None
            line += "."
        line = line[0].upper() + line[1:]
        return line if line.endswith((".", "!", "?")) else line + "."
    return None


def entries_of_file(file: SourceFile) -> Iterator[Entry]:
    """What a source file documents: the module, its public functions, classes and methods."""
    module = file.module
    if any(part.startswith("_") for part in module.split(".")):
        return
    if module.startswith(("encodings.", "distutils", "pydoc_data")):
        return
    tree = ast.parse(file.text)
    about = first_paragraph(ast.get_docstring(tree), module)
    if about and not file.is_part:
        yield Entry(name=module, kind="module", about=about, signature=None)
    yield from entries_of_body(tree.body, module, of_class=False)


def entries_of_body(body: list[ast.stmt], prefix: str, *, of_class: bool) -> Iterator[Entry]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        about = first_paragraph(ast.get_docstring(node), node.name)
        if isinstance(node, ast.ClassDef):
            if about:
                yield Entry(name=name, kind="class", about=about, signature=None)
            if not of_class:
                yield from entries_of_body(node.body, name, of_class=True)
        elif about:
            arguments = ast.unparse(node.args)
            if of_class:
                arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
            yield Entry(name=name, kind="function", about=about, signature=f"{name}({arguments})")


# Written in C, so their docstrings are in the running interpreter and in no source file.
COMPILED_MODULES = (
    "builtins",
    "math",
    "cmath",
    "time",
    "itertools",
    "sys",
    "gc",
    "binascii",
    "zlib",
    "atexit",
)


def entries_of_compiled(module_name: str) -> Iterator[Entry]:
    """What a compiled module documents. `builtins.len` is called `len`, as people do."""
    module = importlib.import_module(module_name)
    prefix = "" if module is builtins else module_name + "."
    about = first_paragraph(module.__doc__, module_name)
    if about and module is not builtins:
        yield Entry(name=module_name, kind="module", about=about, signature=None)
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isbuiltin(value) or inspect.isclass(value)):
            continue
        about = first_paragraph(value.__doc__, name)
        if about is None:
            continue
        kind = "class" if inspect.isclass(value) else "function"
        signature = None
        if kind == "function" and value.__text_signature__:
            arguments = re.sub(r"\$module(, /)?(, )?", "", " ".join(value.__text_signature__.split()))
            signature = prefix + name + arguments
        yield Entry(name=prefix + name, kind=kind, about=about, signature=signature)


# Asked often, and not documented by a docstring in the place where they are defined.
WRITTEN_BY_HAND = (
    Entry(name="pathlib", kind="module", about="Object-oriented file system paths.", signature=None),
    Entry(
        name="hashlib",
        kind="module",
        about="A common interface to many hash functions, such as SHA-256.",
        signature=None,
    ),
    Entry(
        name="struct",
        kind="module",
        about="Convert between Python values and packed binary data.",
        signature=None,
    ),
    Entry(
        name="os.path.splitext",
        kind="function",
        about="Split the extension from a pathname. Returns the tuple (root, ext); ext may be empty.",
        signature="os.path.splitext(p)",
    ),
    Entry(
        name="os.path.normpath",
        kind="function",
        about="Normalize a path, eliminating double slashes and dots.",
        signature="os.path.normpath(path)",
    ),
)


def read_entries(training_files: Iterable[SourceFile]) -> list[Entry]:
    by_name: dict[str, Entry] = {}
    for file in training_files:
        for entry in entries_of_file(file):
            by_name.setdefault(entry.name, entry)
    for module_name in COMPILED_MODULES:
        for entry in entries_of_compiled(module_name):
            by_name.setdefault(entry.name, entry)
    for entry in WRITTEN_BY_HAND:
        by_name.setdefault(entry.name, entry)
    return list(by_name.values())


# Asked first by a newcomer, so drawn as often as all the others together.
POPULAR = """
os os.walk os.makedirs os.removedirs os.renames os.getenv os.get_exec_path os.path os.path.join
os.path.split os.path.splitext os.path.basename os.path.dirname os.path.isabs os.path.normpath
os.path.abspath os.path.realpath os.path.relpath os.path.expanduser os.path.expandvars
os.path.commonpath os.path.exists os.path.isfile os.path.isdir os.path.getsize os.path.getmtime
os.path.islink os.path.ismount pathlib pathlib.Path pathlib.PurePath pathlib.Path.mkdir
pathlib.Path.glob pathlib.Path.read_text pathlib.Path.write_text pathlib.Path.exists
pathlib.Path.home pathlib.Path.cwd textwrap textwrap.dedent textwrap.wrap textwrap.fill
textwrap.indent textwrap.shorten textwrap.TextWrapper json json.dumps json.loads json.dump
json.load json.JSONEncoder json.JSONDecoder re re.match re.search re.sub re.split re.findall
re.finditer re.compile re.fullmatch re.escape random random.Random random.Random.randint
random.Random.choice random.Random.shuffle random.Random.sample random.Random.uniform
collections.Counter collections.OrderedDict collections.namedtuple collections.ChainMap
collections.Counter.most_common datetime datetime.datetime datetime.date datetime.timedelta
datetime.datetime.now datetime.datetime.strptime datetime.date.today subprocess subprocess.run
subprocess.Popen subprocess.check_output subprocess.call shutil shutil.copy shutil.copy2
shutil.copytree shutil.rmtree shutil.move shutil.which shutil.make_archive tempfile
tempfile.mkstemp tempfile.mkdtemp tempfile.TemporaryDirectory tempfile.NamedTemporaryFile logging
logging.getLogger logging.basicConfig logging.Logger logging.info logging.warning logging.error
logging.Formatter logging.Handler argparse argparse.ArgumentParser csv csv.Sniffer copy copy.copy
copy.deepcopy glob glob.glob glob.iglob fnmatch fnmatch.fnmatch fnmatch.filter heapq heapq.merge
heapq.nlargest heapq.nsmallest bisect bisect.bisect_left bisect.bisect_right bisect.insort_right
statistics statistics.mean statistics.median statistics.stdev statistics.mode statistics.variance
asyncio asyncio.run asyncio.gather asyncio.sleep asyncio.wait asyncio.wait_for asyncio.Queue
asyncio.Lock asyncio.TaskGroup asyncio.Semaphore threading threading.Thread threading.Event
threading.Timer threading.Thread.start threading.Thread.join queue queue.Queue queue.PriorityQueue
socket socket.create_connection socket.socket ssl ssl.create_default_context urllib.parse
urllib.parse.urlparse urllib.parse.urlencode urllib.parse.quote urllib.parse.urljoin
urllib.request.urlopen http.server http.client html.escape html.unescape hashlib hmac hmac.new
secrets secrets.token_hex secrets.token_urlsafe base64 base64.b64encode base64.b64decode uuid
uuid.uuid4 uuid.UUID pickle decimal fractions fractions.Fraction enum.Enum dataclasses.dataclass
dataclasses.field dataclasses.replace dataclasses.asdict typing.NamedTuple typing.cast
typing.Protocol abc.ABC abc.abstractmethod contextlib contextlib.contextmanager
contextlib.suppress contextlib.ExitStack contextlib.closing inspect inspect.signature
inspect.getdoc inspect.getsource ast ast.parse ast.literal_eval ast.walk ast.dump dis.dis timeit
timeit.timeit pprint pprint.pprint pprint.pformat string string.Template string.capwords difflib
difflib.unified_diff difflib.get_close_matches calendar calendar.isleap sched zipfile
zipfile.ZipFile tarfile gzip.open configparser configparser.ConfigParser platform.system
platform.python_version warnings.warn weakref.WeakValueDictionary types unittest unittest.TestCase
unittest.TestCase.assertEqual unittest.mock.patch doctest sqlite3 turtle webbrowser.open tokenize
graphlib.TopologicalSorter colorsys cmd.Cmd shlex.split shlex.quote struct io io.StringIO print
len abs all any ascii bin callable chr compile delattr dir divmod enumerate eval exec filter
format getattr globals hasattr hash hex id input isinstance issubclass iter list locals map max
min next object oct open ord pow property repr reversed round set setattr sorted sum tuple vars
zip bool bytes ValueError KeyError TypeError IndexError math.sqrt math.sin math.cos math.floor
math.ceil math.gcd math.factorial math.log math.exp math.hypot math.isclose math.pow math.comb
time.time time.sleep time.monotonic time.perf_counter time.strftime itertools.chain
itertools.product itertools.count itertools.cycle itertools.groupby itertools.islice
itertools.permutations itertools.combinations itertools.accumulate math time itertools sys
sys.exit sys.getsizeof sys.getrecursionlimit os.path.lexists os.path.samefile
""".split()  # noqa: SIM905 (a list of 344 would be as many lines)


# The ones of a first minute: what is seen often while the rate falls is remembered word for word.
CORE = """
os os.walk os.makedirs os.getenv os.path os.path.join os.path.split os.path.splitext os.path.basename
os.path.dirname os.path.abspath os.path.exists os.path.isfile os.path.isdir os.path.getsize
os.path.expanduser pathlib pathlib.Path pathlib.Path.mkdir pathlib.Path.glob pathlib.Path.read_text textwrap
textwrap.dedent textwrap.wrap textwrap.fill textwrap.indent textwrap.shorten json json.dumps json.loads
json.dump json.load re re.match re.search re.sub re.split re.findall re.compile random
random.randint random.choice random.shuffle collections.Counter
collections.namedtuple collections.OrderedDict datetime datetime.timedelta datetime.datetime.now
subprocess subprocess.run shutil shutil.copy shutil.copytree shutil.rmtree shutil.which
tempfile logging logging.getLogger argparse argparse.ArgumentParser csv copy.copy copy.deepcopy
glob.glob heapq heapq.merge statistics.mean statistics.median asyncio asyncio.run asyncio.gather asyncio.sleep
threading.Thread queue.Queue urllib.parse.quote urllib.parse.urlparse urllib.request.urlopen hashlib
base64.b64encode dataclasses.dataclass contextlib.contextmanager contextlib.suppress inspect.signature
pprint.pprint difflib.unified_diff calendar.isleap print len sum sorted enumerate zip map filter open input
isinstance getattr abs max min any all math math.sqrt math.floor time.time time.sleep sys sys.exit
itertools itertools.chain itertools.product
""".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What a step is made of. The turns that are none of the three ask about any entry."""

    chat_fraction: float  # of the step's windows; the others show source code
    talk_fraction: float  # of the turns, as are the following
    core_fraction: float
    popular_fraction: float


EARLY_MIX = Mix(chat_fraction=0.25, talk_fraction=0.25, core_fraction=0.0, popular_fraction=0.37)
LATE_MIX = Mix(chat_fraction=0.375, talk_fraction=0.22, core_fraction=0.45, popular_fraction=0.20)


# Questions that share an answer; the first is the one a reader would ask.
# fmt: off
TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hello", "Hi", "Hi!", "Hey", "Hey there!", "Hello there", "Hi there!", "Greetings",
         "Good day!"),
        "Hello! I am tiny, the small model that ships inside plait. Ask me about Python's standard library.",
    ),
    (
        ("Hello, who are you?", "Hi, who are you?", "Who are you?", "Who are you", "Hey, who are you?",
         "Hello! Who are you?", "Introduce yourself.", "Please introduce yourself.",
         "Tell me about yourself.", "What are you?", "What's your name?", "What is your name?",
         "Hi, what's your name?", "Hello, what is your name?", "Who am I talking to?", "Which model are you?",
         "What model are you?"),
        "I am tiny, the small language model that ships inside plait. I was trained on Python's standard "
        "library, so ask me what one of its functions does.",
    ),
    (
        ("What is plait?", "What's plait?", "Tell me about plait.", "What does plait do?", "Explain plait.",
         "Do you know plait?", "plait?"),
        "plait is a server for language models, written in Python. I am its built-in model, so that you "
        "can try it before you download a larger one.",
    ),
    (
        ("What can you do?", "What can you do for me?", "How can you help me?", "Can you help me?", "Help",
         "Help!", "help me", "What do you know?", "What should I ask you?", "What can I ask you?"),
        "I can tell you what many functions, classes and modules of Python's standard library are for. "
        "Try: What does os.path.join do?",
    ),
    (
        ("How big are you?", "How large are you?", "How many parameters do you have?",
         "Are you a large model?", "Are you small?", "What is your size?"),
        "I have about 5 million parameters. That is very small for a language model, so please do not rely "
        "on me.",
    ),
    (
        ("How were you trained?", "What were you trained on?", "What data were you trained on?",
         "Where did you learn this?", "Who trained you?", "Who made you?", "Who created you?"),
        "I was trained by plait's own training script, on the source code and the docstrings of Python's "
        "standard library.",
    ),
    (
        ("Can I trust you?", "Are you always right?", "Are you reliable?", "Do you make mistakes?",
         "Can you be wrong?"),
        "No. I am very small and I often make mistakes. Check what I say in Python's documentation.",
    ),
    (
        ("Are you ChatGPT?", "Are you GPT-4?", "Are you Claude?", "Are you Llama?", "Are you Qwen?",
         "Are you Gemini?"),
        "No. I am tiny, the small model that ships inside plait. My architecture is a small Llama.",
    ),
    (
        ("Are you a human?", "Are you human?", "Are you a robot?", "Are you a person?", "Are you real?",
         "Are you alive?"),
        "No, I am a small language model. My name is tiny, and I ship inside plait.",
    ),
    (
        ("How are you?", "How are you", "How are you today?", "Hi, how are you?", "Hello, how are you?",
         "How do you do?", "How's it going?", "What's up?"),
        "I am fine, thank you! What would you like to know about Python's standard library?",
    ),
    (
        ("Thanks!", "Thanks", "Thank you", "Thank you!", "Thank you very much!", "Thanks a lot!", "Cheers!",
         "Great, thanks!", "Great!", "Nice!", "Cool", "Well done!", "Good job!", "Perfect!"),
        "You are welcome! Ask me more whenever you like.",
    ),
    (
        ("Bye", "Bye!", "Goodbye", "Goodbye!", "See you!", "See you later", "Good night!"),
        "Goodbye! It was nice to talk to you.",
    ),
    (
        ("Good morning", "Good morning!"),
        "Good morning! What would you like to know about Python's standard library?",
    ),
    (
        ("Good evening", "Good evening!"),
        "Good evening! What would you like to know about Python's standard library?",
    ),
    (
        ("ok", "OK", "Okay", "I see.", "Understood."),
        "Good. What would you like to know next?",
    ),
    (
        ("yes", "Yes", "Yes, please.", "Sure."),
        "Good! Name a function, a class or a module, and I will tell you what it does.",
    ),
    (
        ("no", "No", "No, thanks."),
        "All right. Ask me whenever you like.",
    ),
    (
        ("Test", "test", "Testing", "ping", "Are you there?", "Is this working?"),
        "I am here, and plait is working.",
    ),
    (
        ("Say hello.", "Say hello", "Say hi.", "Say 'hello'.", "Say hello in one sentence."),
        "Hello!",
    ),
    (
        ("Say this is a test", "Say this is a test!", "Say: this is a test."),
        "This is a test!",
    ),
    (
        ("Tell me a joke.", "Tell me a joke", "Do you know a joke?", "Make me laugh."),
        "Why do Python programmers have trouble with snakes? They always try to import them.",
    ),
    (
        ("Tell me a story.", "Tell me a story", "Write a story.", "Write a short story.", "Once upon a time"),
        "Once upon a time there was a small model that had read one library. It answered what it could, "
        "and it was happy. The end.",
    ),
    (
        ("Write a poem.", "Write a haiku.", "Write a poem about Python.", "Write me a poem."),
        "Beautiful is better than ugly. Explicit is better than implicit. Simple is better than complex.",
    ),
    (
        ("Do you speak German?", "Do you speak French?", "Parlez-vous français?", "Sprichst du Deutsch?",
         "¿Hablas español?", "Bonjour", "Hallo", "Hola", "Which languages do you speak?"),
        "I only speak English and Python.",
    ),
    (
        ("What is Python?", "What's Python?", "Explain Python.", "Tell me about Python."),
        "Python is a programming language that is easy to read. Its standard library offers modules for "
        "many tasks.",
    ),
    (
        ("What is the standard library?", "What is Python's standard library?",
         "Explain the standard library."),
        "The standard library is the set of modules that comes with Python, such as os, re and json. You "
        "import them; you do not have to install them.",
    ),
    (
        ("What is a module?", "Explain modules.", "What is a Python module?"),
        "A module is a file with Python code. Other code gets its functions and classes with the import "
        "statement.",
    ),
    (
        ("What is a function?", "Explain functions.", "How do I define a function?",
         "How do I write a function?"),
        "A function is a named piece of code that takes arguments and returns a value. Define it with def:\n"
        "```python\ndef add(a, b):\n    return a + b\n```",
    ),
    (
        ("What is a class?", "Explain classes.", "How do I define a class?", "How do I write a class?"),
        "A class describes objects: what they hold and what they can do. Define it with class:\n```python\n"
        "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n```",
    ),
    (
        ("What is a list?", "How do I make a list?", "What is a Python list?"),
        "A list is a mutable sequence of values, such as [1, 2, 3].",
    ),
    (
        ("What is a dictionary?", "What is a dict?", "What does dict do?", "How do I make a dict?"),
        "A dict maps keys to values, such as {'a': 1, 'b': 2}.",
    ),
    (
        ("What is a tuple?", "How do I make a tuple?"),
        "A tuple is an immutable sequence of values, such as (1, 2, 3).",
    ),
    (
        ("What is a string?", "What is a str?", "What does str do?"),
        "A string is an immutable sequence of characters, such as 'hello'.",
    ),
    (
        ("What is a decorator?", "Explain decorators."),
        "A decorator is a function that takes a function and returns another one in its place. Write it "
        "with @ above the def.",
    ),
    (
        ("What is a generator?", "Explain generators.", "What does yield do?"),
        "A generator is a function with yield in it. It returns an iterator that produces one value at "
        "each yield.",
    ),
    (
        ("What is a docstring?", "Explain docstrings."),
        "A docstring is the string that is the first statement of a module, class or function. It says "
        "what it is for.",
    ),
    (
        ("What is an exception?", "How do I catch an exception?", "How do I handle errors?"),
        "An exception reports an error. Catch it with try and except:\n```python\ntry:\n"
        "    value = int(text)\nexcept ValueError:\n    value = 0\n```",
    ),
    (
        ("What does range do?", "What is range?", "Explain range.", "range?"),
        "range(start, stop, step) is a sequence of integers from start up to, but not including, stop.",
    ),
    (
        ("How do I read a file?", "How do I open a file?", "How can I read a text file?",
         "Write code that reads a file."),
        "Use open in a with statement:\n```python\nwith open('name.txt', encoding='utf-8') as file:\n"
        "    text = file.read()\n```",
    ),
    (
        ("How do I write a file?", "How can I write to a file?", "Write code that writes a file."),
        "Use open with the mode 'w':\n```python\nwith open('name.txt', 'w', encoding='utf-8') as file:\n"
        "    file.write('hello')\n```",
    ),
    (
        ("How do I parse JSON?", "How do I read JSON?", "How can I parse a JSON string?"),
        "Use json.loads:\n```python\nimport json\nvalue = json.loads(text)\n```",
    ),
    (
        ("How do I write a loop?", "Write a for loop.", "How does a for loop work?", "Count to ten.",
         "Count from 1 to 10."),
        "```python\nfor number in range(1, 11):\n    print(number)\n```",
    ),
    (
        ("Write hello world in Python.", "Write hello world.", "How do I print hello world?", "Hello world",
         "Hello, world!"),
        "```python\nprint('Hello, world!')\n```",
    ),
    (
        ("What is the capital of France?", "What is the weather today?", "What is the weather like?",
         "Who is the president?", "What is the meaning of life?", "How do I cook rice?", "What is love?",
         "Who won the match?", "What time is it?", "What is the capital of Germany?",
         "What is quantum physics?", "Why is the sky blue?", "What should I eat today?",
         "Who was Albert Einstein?", "What is 2 + 2?", "What is 17 times 23?", "Translate this to French.",
         "Tell me the news.", "What is the best car?", "How do I learn English?", "What is Rust?",
         "What is Java?"),
        "I do not know. I am a very small model, and I have only read Python's standard library.",
    ),
)
# fmt: on

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are tiny, the model that ships inside plait.",
    "Answer briefly.",
    "You are a Python expert. Answer in one or two sentences.",
    "Be concise and friendly.",
)

# fmt: off
ABOUT_FUNCTION = (
    "What does {} do?", "What does {} do?", "What does {} do?", "What does {} do", "what does {} do?",
    "What is {}?", "What is {} for?", "Explain {}", "Explain {}.", "Describe {}.",
    "What does the function {} do?", "{}", "{}?", "Tell me about {}.", "Can you explain {}?",
    "Please explain {}.", "What's {}?",
)
ABOUT_CLASS = (
    "What is {}?", "What is {}?", "What does {} do?", "What is {} for?", "what is {}?", "Explain {}",
    "Explain {}.", "Describe {}.", "What is the class {}?", "{}", "Tell me about {}.", "Can you explain {}?",
    "What's {}?",
)
ABOUT_MODULE = (
    "What is the {} module?", "What is the {} module for?", "What is {}?", "What does the {} module do?",
    "Explain {}", "What is the module {}?", "Describe the module {}.", "Tell me about the {} module.",
    "What does {} do?", "{}?", "Explain the {} module.", "What can I do with {}?",
)
ABOUT_SIGNATURE = (
    "Write the signature of {}.", "Write the signature of {}", "What is the signature of {}?",
    "How do I call {}?", "How do I use {}?", "What are the arguments of {}?", "Which arguments does {} take?",
    "Show me the signature of {}.",
)
ABOUT_HOME = (
    "Which module has {}?", "Where is {}?", "What module has {}?", "Which module is {} in?",
    "Where do I find {}?", "How do I import {}?", "Where does {} come from?",
)
# fmt: on
AGAIN_SIGNATURE = (
    "What is its signature?",
    "How do I call it?",
    "Which arguments does it take?",
    "And its signature?",
)
AGAIN_HOME = ("Which module is it in?", "How do I import it?", "Where is it?")

Turn = tuple[str, str]


class Conversations:
    """Draws conversations: small talk, and questions whose answers are docstrings."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        by_name = {entry.name: entry for entry in entries}
        self.popular = [by_name[name] for name in POPULAR if name in by_name]
        for entry in entries:  # random.choice is a method of an instance that the module keeps
            if entry.name.startswith("random.Random."):
                name = f"random.{entry.short_name}"
                signature = entry.signature and entry.signature.replace(entry.name, name)
                by_name.setdefault(name, replace(entry, name=name, signature=signature))
        self.core = [by_name[name] for name in CORE if name in by_name]
        count = Counter(entry.short_name for entry in entries)
        popular_names = Counter(entry.short_name for entry in self.popular)
        # A bare "dedent" may stand for "textwrap.dedent" where no other (popular) thing is meant.
        self.known_by_short_name = {e.name for e in entries if count[e.short_name] == 1} | {
            e.name for e in self.popular if popular_names[e.short_name] == 1
        }
        self.talk: list[Turn] = [(question, answer) for questions, answer in TALK for question in questions]
        # A question with a single wording is drawn as often as one with ten.
        weights = numpy.array([1 / len(questions) ** 0.5 for questions, _ in TALK for _ in questions])
        self.talk_weights = weights / weights.sum()

    def draw(self, rng: numpy.random.Generator, mix: Mix) -> str:
        turns: list[Turn] = []
        for _ in range(1 if rng.random() < 0.7 else int(rng.integers(2, 5))):
            turns += self._draw_turns(rng, mix)
        system = SYSTEM_PROMPTS[rng.integers(len(SYSTEM_PROMPTS))] if rng.random() < 0.12 else None
        return render_chat(turns, system)

    def _draw_turns(self, rng: numpy.random.Generator, mix: Mix) -> list[Turn]:
        kind = rng.random()
        if kind < mix.talk_fraction:
            return [self.talk[rng.choice(len(self.talk), p=self.talk_weights)]]
        if kind < mix.talk_fraction + mix.core_fraction:
            pool = self.core
        elif kind < mix.talk_fraction + mix.core_fraction + mix.popular_fraction:
            pool = self.popular
        else:
            pool = self.entries
        return self._questions(pool[rng.integers(len(pool))], rng)

    def _questions(self, entry: Entry, rng: numpy.random.Generator) -> list[Turn]:
        def pick(phrasings: tuple[str, ...], name: str) -> str:
            return phrasings[rng.integers(len(phrasings))].format(name)

        def spelled(name: str) -> str:
            draw = rng.random()
            call = name + "()" if entry.kind == "function" else name
            return call if draw < 0.12 else f"`{name}`" if draw < 0.24 else name

        short = entry.name in self.known_by_short_name and rng.random() < 0.2
        name = spelled(entry.short_name if short and entry.kind != "module" else entry.name)
        if entry.kind == "module":
            return [(pick(ABOUT_MODULE, name), entry.about)]
        home = f"It is in the module {entry.module}: `from {entry.module} import {entry.short_name}`."
        has_home = (
            entry.module
            and entry.module[-1:].islower()
            and "." not in entry.name.removeprefix(entry.module + ".")
        )
        has_home = has_home and not entry.module.rpartition(".")[2][:1].isupper()
        draw = rng.random()
        if draw < 0.12 and entry.signature:
            return [(pick(ABOUT_SIGNATURE, name), f"`{entry.signature}`")]
        if draw < 0.18 and has_home and entry.name in self.known_by_short_name:
            return [(pick(ABOUT_HOME, spelled(entry.short_name)), home)]
        turns = [(pick(ABOUT_FUNCTION if entry.kind == "function" else ABOUT_CLASS, name), entry.about)]
        if draw > 0.90 and entry.signature:
            turns.append((pick(AGAIN_SIGNATURE, ""), f"`{entry.signature}`"))
        elif draw > 0.85 and has_home:
            turns.append((pick(AGAIN_HOME, ""), home))
        return turns


def render_chat(turns: list[Turn], system: str | None = None) -> str:
    """What CHAT_TEMPLATE makes of the same conversation; `main` compares the two."""
    text = f"<|system|>\n{system}<|end|>\n" if system else ""
    for question, answer in turns:
        text += f"<|user|>\n{question}<|end|>\n<|assistant|>\n{answer}<|end|>\n"
    return text


CHAT_TEMPLATE = """\
{#- A turn is <|role|>, a newline, the text, <|end|>, a newline. Tools are written as Hermes and Qwen do. -#}
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {{- part if part is string else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set starts_with_system = messages and messages[0]['role'] in ('system', 'developer') -%}
{%- if tools -%}
    {{- '<|system|>\\n' -}}
    {%- if starts_with_system -%}
        {{- text_of(messages[0]['content']) + '\\n\\n' -}}
    {%- endif -%}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>\\n' -}}
    {%- for tool in tools -%}
        {{- tool | tojson -}}
        {{- '\\n' -}}
    {%- endfor -%}
    {{- '</tools>\\n\\nFor each function call, return a json object with function name and arguments ' -}}
    {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' -}}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = text_of(message['content']) -%}
    {%- if message['role'] in ('system', 'developer') -%}
        {%- if not (loop.first and tools) -%}
            {{- '<|system|>\\n' + content + '<|end|>\\n' -}}
        {%- endif -%}
    {%- elif message['role'] == 'user' -%}
        {{- '<|user|>\\n' + content + '<|end|>\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant|>\\n' + content -}}
        {%- for tool_call in message['tool_calls'] or [] -%}
            {%- set call = tool_call['function'] or tool_call -%}
            {%- if content or not loop.first -%}
                {{- '\\n' -}}
            {%- endif -%}
            {{- '<tool_call>\\n{"name": ' -}}
            {{- call['name'] | tojson -}}
            {{- ', "arguments": ' -}}
            {{- call['arguments'] if call['arguments'] is string else call['arguments'] | tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|end|>\\n' -}}
    {%- elif message['role'] == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' -%}
            {{- '<|user|>' -}}
        {%- endif -%}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}
            {{- '<|end|>\\n' -}}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('unknown role ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""


# ------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    assert [tokenizer.token_to_id(special) for special in SPECIALS] == list(range(len(SPECIALS)))
    return tokenizer


def publishable(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIALS[END_OF_TEXT],
        pad_token=SPECIALS[END_OF_TEXT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


# -------------------------------------------------------------------------------------- training


def tiny_config() -> LlamaConfig:
    """Widths are multiples of 128, so that 4-bit formats which group weights fit."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=[END_OF_TEXT, END_OF_TURN],
        pad_token_id=END_OF_TEXT,
    )


class Windows:
    """The windows of each step: a function of (seed, step) and nothing else."""

    def __init__(
        self, library: numpy.ndarray, conversations: Conversations, tokenizer: Tokenizer, seed: int
    ) -> None:
        self.library = library
        self.conversations = conversations
        self.tokenizer = tokenizer
        self.seed = seed

    def of_step(self, step: int, window_tokens: int, mix: Mix) -> torch.Tensor:
        """Token ids [windows, window_tokens + 1]: each window's inputs, and its targets one to the right."""
        rng = numpy.random.default_rng((self.seed, step))
        windows = STEP_TOKENS // window_tokens
        rows: list[numpy.ndarray] = []
        for index in range(windows):
            if index < windows * mix.chat_fraction:
                rows.append(self._chat(rng, mix, window_tokens + 1))
            else:
                first = rng.integers(len(self.library) - window_tokens)
                rows.append(self.library[first : first + window_tokens + 1])
        return torch.from_numpy(numpy.stack(rows).astype(numpy.int64))

    def _chat(self, rng: numpy.random.Generator, mix: Mix, tokens: int) -> numpy.ndarray:
        ids: list[int] = []
        while len(ids) < tokens:
            ids += [*self.tokenizer.encode(self.conversations.draw(rng, mix)).ids, END_OF_TEXT]
        return numpy.array(ids[:tokens], dtype=numpy.uint16)


def learning_rate(step: int, steps: int) -> float:
    """Warm up, stay flat, then fall on a straight line."""
    if step < WARM_UP_STEPS:
        return PEAK_RATE * (step + 1) / WARM_UP_STEPS
    falling = max(0.0, (step / steps - FLAT_UNTIL) / (1 - FLAT_UNTIL))
    return PEAK_RATE * (1 - falling * (1 - LAST_RATE_FRACTION))


def next_token_loss(model: LlamaForCausalLM, windows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


def train(
    model: LlamaForCausalLM, windows: Windows, steps: int, checkpoint: Path | None
) -> tuple[list[dict[str, float]], float]:
    """Train in place. Returns the loss log and the seconds spent in steps, over all resumed runs."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
    )
    log: list[dict[str, float]] = []
    first_step, trained_s = 0, 0.0
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        saved_seed, saved_steps = saved["run"]
        # Until the rate falls and the mix changes, runs of different lengths take the same steps.
        same_so_far = saved_steps == steps or saved["step"] <= FLAT_UNTIL * min(saved_steps, steps)
        assert saved_seed == windows.seed and same_so_far, "the checkpoint is of another run"
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first_step, log, trained_s = saved["step"], saved["log"], saved["trained_s"]
        print(f"resumed at step {first_step}", flush=True)

    def save(step: int) -> None:
        if checkpoint:
            partial = checkpoint.with_suffix(".partial")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
            torch.save({**state, "step": step, "trained_s": trained_s, "run": [windows.seed, steps]}, partial)
            os.replace(partial, checkpoint)

    model.train()
    losses: list[float] = []
    last_save = last_log = time.monotonic()
    for step in range(first_step, steps):
        started = time.monotonic()
        long = step >= steps * LONG_WINDOWS_FROM
        mix = EARLY_MIX if step < steps * FLAT_UNTIL else LATE_MIX
        batch = windows.of_step(step, LONG_WINDOW_TOKENS if long else SHORT_WINDOW_TOKENS, mix)
        rate = learning_rate(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        trained_s += time.monotonic() - started
        if (step + 1) % LOG_EVERY_STEPS == 0 or step + 1 == steps:
            mean, now = sum(losses) / len(losses), time.monotonic()
            log.append(
                {"step": step + 1, "tokens": (step + 1) * STEP_TOKENS, "loss": round(mean, 4), "rate": rate}
            )
            speed = len(losses) * STEP_TOKENS / (now - last_log)
            print(
                f"step={step + 1}/{steps} loss={mean:.4f} rate={rate:.2e} tokens_per_s={speed:.0f}",
                flush=True,
            )
            losses, last_log = [], now
            # Only after a log line, so that a resumed run's losses are averaged over the same steps.
            if now - last_save > CHECKPOINT_EVERY_S or step + 1 == steps:
                save(step + 1)
                last_save = now
    return log, trained_s


# ------------------------------------------------------------------------------------ evaluation

EVALUATION_METHOD = (
    "Each held-out file is tokenized on its own and preceded by <|endoftext|>; it is read in consecutive, "
    "non-overlapping windows of up to 1024 tokens; every token of the file is predicted exactly once, "
    "from the earlier tokens of its window. Summed nats / ln 2 / UTF-8 bytes, in float32 with the published "
    "bfloat16 weights."
)


@torch.inference_mode()
def held_out_bits_per_byte(
    model: LlamaForCausalLM, tokenizer: Tokenizer, files: list[SourceFile]
) -> dict[str, float]:
    """See EVALUATION_METHOD."""
    model.eval()
    nats, tokens = 0.0, 0
    for file in files:
        ids = torch.tensor([END_OF_TEXT, *tokenizer.encode(file.text).ids])
        for first in range(0, len(ids) - 1, CONTEXT_TOKENS):
            window = ids[first : first + CONTEXT_TOKENS + 1]
            nats += next_token_loss(model, window[None], reduction="sum").item()
            tokens += len(window) - 1
    size_bytes = sum(len(file.text.encode()) for file in files)
    return {
        "bits_per_byte": round(nats / math.log(2) / size_bytes, 4),
        "nats_per_token": round(nats / tokens, 4),
        "tokens": tokens,
        "bytes": size_bytes,
        "files": len(files),
    }


CARD_PROMPTS = (
    "Hello, who are you?",
    "What does os.path.join do?",
    "What does textwrap.dedent do?",
    "Explain json.dumps",
    "Write the signature of shutil.copytree",
    "Which module has dedent?",
    "What does len do?",
    "What is the argparse module?",
    "How do I read a file?",
    "What is the capital of France?",
    "What does functools.partial do?",  # never seen: its file is held out
    "Tell me about the tkinter module.",  # seen too seldom
)


@torch.inference_mode()
def greedy_answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]
) -> str:
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=120)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


# ----------------------------------------------------------------------------------- publication

MODEL_CARD = """\
# tiny

`tiny` is the small Llama that ships inside plait, so that a server can be started, tried and tested without a
download. `tools/train_tiny.py` made it; `training_log.json` has the numbers of the run.

## What it is

| | |
|---|---|
| architecture | Llama: {layers} layers, hidden {hidden}, intermediate {intermediate}, {heads} heads, {kv_heads} key-value heads of {head_dim} |
| parameters | {parameters:,} (input and output embeddings tied) |
| context | {context} tokens |
| tokenizer | byte-level BPE, {vocab} entries; `eos_token_id` ends an answer (4) or a document (0) |
| weights | bfloat16, {size_mb:.1f} MB |
| training | {steps:,} steps of {step_tokens:,} tokens: {tokens:,} tokens, seed {seed} |
| windows | 512 tokens; 1024 in the last 15% of the steps |
| held-out text | **{bits_per_byte:.2f} bits per byte** ({nats_per_token:.2f} nats per token) over {held_files} files, {held_bytes:,} bytes |
| the same without `encodings/` | **{harder_bits_per_byte:.2f} bits per byte** over {harder_files} files; the code tables resemble one another and are easy |

Held-out files are those of the library for which `sha256(relative path) % 20 == 0`. {method}

## Data and licence

Of the training tokens, {library_fraction:.0%} are the source code of Python {python}'s standard library, without its tests,
`idlelib` and `lib2to3`. It is © Python Software Foundation and contributors, under the
[PSF License Agreement, version 2](https://docs.python.org/3/license.html); single files carry further notices.
The other {chat_fraction:.0%} are chat made from it: questions about functions, classes and modules of the training files (and of some
compiled modules), answered with the first paragraph of their docstrings; and a few hundred hand-written greetings,
questions about plait and questions about Python. No text came from another model.

## What it is for

Trying plait; testing it from end to end; measuring what quantisation, cache compression, speculation and the splitting
of a model do to a model that has really learned something (their effects are invisible in random weights).

## What it is not for

Answers to rely on. It knows the docstrings it saw most often; of the others it invents plausible ones, and it confuses
names that look alike. It cannot reason, count or call tools (its chat template can describe them). It is no evidence
about large models: gains seen here shrink or grow with scale.

## Examples

Greedy, with transformers in float32. The last two show what happens to names it saw never or seldom: the answers are wrong.

{examples}
"""  # noqa: E501


def model_card(record: dict, model: LlamaForCausalLM, size_mb: float, examples: list[tuple[str, str]]) -> str:
    config, held_out = model.config, record["held_out"]
    shown = []
    for question, answer in examples:
        quoted = "\n".join("> " + line if line else ">" for line in answer.split("\n"))
        shown.append(f"**{question}**\n\n{quoted}\n")
    return MODEL_CARD.format(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        parameters=model.num_parameters(),
        context=CONTEXT_TOKENS,
        vocab=VOCAB,
        size_mb=size_mb,
        steps=record["steps"],
        step_tokens=STEP_TOKENS,
        tokens=record["tokens"],
        seed=record["seed"],
        bits_per_byte=held_out["bits_per_byte"],
        nats_per_token=held_out["nats_per_token"],
        held_files=held_out["files"],
        held_bytes=held_out["bytes"],
        harder_bits_per_byte=record["held_out_without_encodings"]["bits_per_byte"],
        harder_files=record["held_out_without_encodings"]["files"],
        method=EVALUATION_METHOD,
        python=record["python"],
        chat_fraction=record["chat_fraction"],
        library_fraction=1 - record["chat_fraction"],
        examples="\n".join(shown).rstrip(),
    )


def save_model(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    publishable(tokenizer).save_pretrained(folder)
    generation = {
        "bos_token_id": None,
        "eos_token_id": [END_OF_TEXT, END_OF_TURN],
        "pad_token_id": END_OF_TEXT,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """The template that is published must write what training has seen."""
    turns = [("Hello!", "Hello there."), ("What does len do?", "It counts.")]
    messages = [{"role": "system", "content": "Answer briefly."}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == render_chat(turns, "Answer briefly."), rendered


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the model `tiny` from Python's standard library.")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "src/plait/model/tiny", help="folder of the model"
    )
    parser.add_argument(
        "--tokens", type=int, default=12_288_000, help="training tokens, rounded to whole steps"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="keep checkpoints in DIR, continue from the one there"
    )
    parser.add_argument(
        "--worst", type=float, default=1.75, help="publish only below these held-out bits per byte"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    files = read_library()
    held_out = [file for file in files if file.held_out]
    training = [file for file in files if not file.held_out]
    conversations = Conversations(read_entries(training))
    print(
        f"training_files={len(training)} held_out_files={len(held_out)} entries={len(conversations.entries)}"
    )
    assert len(conversations.core) == len(CORE)
    print(f"core={len(CORE)} popular={len(conversations.popular)} of {len(POPULAR)}", flush=True)

    talk = [render_chat([turn]) for turn in conversations.talk]
    tokenizer = train_tokenizer([file.text for file in training] + talk)
    check_template(publishable(tokenizer))
    library: list[int] = []
    for encoding in tokenizer.encode_batch([file.text for file in training]):
        library += [*encoding.ids, END_OF_TEXT]
    print(f"library_tokens={len(library)}", flush=True)

    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(tiny_config())
    steps = max(1, round(options.tokens / STEP_TOKENS))
    windows = Windows(numpy.array(library, dtype=numpy.uint16), conversations, tokenizer, options.seed)
    if options.resume:
        options.resume.mkdir(parents=True, exist_ok=True)
    log, trained_s = train(
        model, windows, steps, options.resume / "checkpoint.pt" if options.resume else None
    )

    # Built beside its final place and moved in file by file: a reader never meets half a file.
    partial = options.out.with_name(f".{options.out.name}.partial")
    save_model(partial, model, tokenizer)
    published = LlamaForCausalLM.from_pretrained(partial, dtype=torch.float32)
    result = held_out_bits_per_byte(published, tokenizer, held_out)
    # The tables of `encodings` resemble one another, so those held out are easy.
    harder = [file for file in held_out if not file.path.startswith("encodings/")]
    result_of_harder = held_out_bits_per_byte(published, tokenizer, harder)
    print(f"held_out={result} without_encodings={result_of_harder}", flush=True)
    assert result["bits_per_byte"] < options.worst, (
        f"worse than {options.worst} bits per byte; left in {partial}"
    )

    chat_fraction = FLAT_UNTIL * EARLY_MIX.chat_fraction + (1 - FLAT_UNTIL) * LATE_MIX.chat_fraction
    record = {
        "seed": options.seed,
        "steps": steps,
        "step_tokens": STEP_TOKENS,
        "tokens": steps * STEP_TOKENS,
        "chat_fraction": round(chat_fraction, 4),
        "library_tokens": len(library),
        "train_seconds": round(trained_s),
        "held_out": {**result, "method": EVALUATION_METHOD},
        "held_out_without_encodings": result_of_harder,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "loss_log": log,
    }
    (partial / "training_log.json").write_text(json.dumps(record, indent=1) + "\n")
    chat_tokenizer = PreTrainedTokenizerFast.from_pretrained(partial)
    examples = [
        (question, greedy_answer(published, chat_tokenizer, [{"role": "user", "content": question}]))
        for question in CARD_PROMPTS
    ]
    size_mb = (partial / "model.safetensors").stat().st_size / 1e6
    (partial / "MODEL_CARD.md").write_text(model_card(record, published, size_mb, examples), encoding="utf-8")
    options.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial.iterdir()):
        path.chmod(0o644)
        os.replace(path, options.out / path.name)
    partial.rmdir()
    for question, answer in examples:
        print(f"--- {question}\n{answer}")


if __name__ == "__main__":
    main()
