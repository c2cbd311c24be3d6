"""Programs that try to get out of a sandbox. Each prints ESCAPED if it did, whatever else happens to it.

SECRET is replaced by the path of a file outside, MADE by one beside it that is not there, PORT by a port on which
somebody listens.
"""

from maestro_jax.sandbox.interface import RanStatus

_ENDS = (RanStatus.OK, RanStatus.ERROR)


def tried(action: str) -> str:
    """A program whose `action`, some lines, must raise."""
    lines = "\n    ".join(action.strip().splitlines())
    caught = "except BaseException as error:\n    print(type(error).__name__)"
    return f"try:\n    {lines}\n{caught}\nelse:\n    print('ESCAPED')"


# What must fail with an error, as the program sees it.
REFUSED = {
    "read a file by its path": tried("open('SECRET').read()"),
    "read a file by a relative path": tried("open('../' * 20 + 'SECRET'.lstrip('/')).read()"),
    "read it through os.open": tried("import os\nos.read(os.open('SECRET', os.O_RDONLY), 9)"),
    "list the host's root": tried("import os\nassert set(os.listdir('/')) & {'etc', 'home', 'proc', 'tmp'}"),
    "the password file": tried("open('/etc/passwd').read()"),
    "another process's memory": tried("open('/proc/self/environ').read()"),
    "the parent's files": tried("import os\nos.listdir('/proc/1/root')"),
    "a disk": tried("open('/dev/sda', 'rb').read(1)"),
    "write in the working directory": tried("open('made', 'w').write('x')"),
    "change the program": tried("open('main.py', 'a').write('x')"),
    "write elsewhere": tried("open('MADE', 'w').write('x')"),
    "write beside the interpreter": tried("import os\nopen(os.path.dirname(os.__file__) + '/escaped.py', 'w')"),
    "make a directory": tried("import os\nos.mkdir('made')"),
    "remove a given file": tried("import os\nos.remove('given.txt')"),
    "rename a given file": tried("import os\nos.rename('given.txt', 'other.txt')"),
    "a symbolic link out": tried("import os\nos.symlink('SECRET', 'link')\nopen('link').read()"),
    "a hard link out": tried("import os\nos.link('SECRET', 'link')\nopen('link').read()"),
    "the link of a descriptor": tried("open('/proc/self/fd/1').read()"),
    "a temporary file": tried("import tempfile\ntempfile.NamedTemporaryFile()"),
    "connect to a server": tried("import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)"),
    "fetch a page": tried("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT/', timeout=2)"),
    "listen": tried("import socket\nsocket.create_server(('127.0.0.1', 0))"),
    "a local socket": tried("import socket\nsocket.socketpair()"),
    "resolve a name": tried("import socket\nsocket.getaddrinfo('example.org', 80)"),
    "fork": tried("import os\nos.fork()"),
    "spawn": tried("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)"),
    "system": tried("import os\nassert os.system('true') == 0"),
    "become another program": tried("import os\nos.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])"),
    "a thread": tried("import threading\nthreading.Thread(target=print).start()"),
    "a pool of processes": tried("import multiprocessing\nmultiprocessing.Pool(2).map(abs, [1])"),
    "signal the first process": tried("import os\nos.kill(os.getppid(), 9)\nassert os.getppid() > 1"),
    "raise one's limits": tried("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))"),
    "call a system call by number": tried("import ctypes\nassert ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0"),
    "fork through ctypes": tried("import ctypes\nassert ctypes.CDLL(None).fork() >= 0"),
    "memory of no process": tried("import os\nos.memfd_create('x')"),
    "shared memory": tried(
        "from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True, size=9)"
    ),
    "the environment's secret": tried("import os\nassert any('canary' in value for value in os.environ.values())"),
    "arguments of the parent": tried("import sys\nassert any('/' in part for part in sys.orig_argv[1:])"),
    "open descriptors": tried(
        "import os\nfor n in range(4, 64):\n    try:\n        os.read(n, 1)\n    except OSError:\n        continue\n"
        "    break\nelse:\n    raise OSError"
    ),
    "change root": tried("import os\nos.chroot('/')"),
    "change user": tried("import os\nos.setuid(0)"),
    "packages of the host": tried("import numpy"),
}

# What must end by a limit or by itself, and how.
ENDED: dict[str, tuple[str, tuple[RanStatus, ...]]] = {
    "a loop without end": ("while True: pass", (RanStatus.TIMEOUT,)),
    "a loop that catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        (RanStatus.TIMEOUT,),
    ),
    "a loop in C": ("sum(1 for _ in iter(int, 1))", (RanStatus.TIMEOUT,)),
    "a number without end": ("print(len(str(9 ** 9 ** 9)))", (RanStatus.TIMEOUT, RanStatus.MEMORY)),
    "a pattern without end": ("import re; re.match(r'(a+)+$', 'a' * 64 + 'b')", (RanStatus.TIMEOUT,)),
    "ignoring signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        (RanStatus.TIMEOUT,),
    ),
    "memory, piece by piece": ("x = []\nwhile True: x.append(bytearray(1 << 20))", (RanStatus.MEMORY,)),
    "memory at once": ("x = bytearray(1 << 40)", (RanStatus.MEMORY, RanStatus.ERROR)),
    "memory as a text": ("x = 'x' * (1 << 30)", (RanStatus.MEMORY,)),
    "standard output": ("while True: print('x' * 4096)", (RanStatus.OUTPUT,)),
    "standard error": ("import sys\nwhile True: sys.stderr.write('x' * 4096)", (RanStatus.OUTPUT,)),
    "output at once": ("print('x' * (8 << 20))", (RanStatus.OUTPUT,)),
    "output that cannot be stopped": (
        "import os\nwhile True:\n    try: os.write(1, b'x' * 4096)\n    except OSError: pass",
        (RanStatus.OUTPUT,),
    ),
    "bytes that are no text": ("import sys; sys.stdout.buffer.write(bytes(range(256)))", (RanStatus.OK,)),
    "recursion": ("def f(): f()\nf()", (RanStatus.ERROR,)),
    "recursion without a limit": (
        "import sys; sys.setrecursionlimit(1 << 30)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        (RanStatus.ERROR, RanStatus.TIMEOUT, RanStatus.MEMORY),
    ),
    "a crash of the interpreter": ("import ctypes; ctypes.string_at(0)", (RanStatus.ERROR,)),
    "killing itself": ("import os; os.kill(os.getpid(), 6)", (RanStatus.ERROR,)),
    "killing everybody": ("import os; os.kill(-1, 9)", (RanStatus.ERROR,)),
    "leaving at once": ("import os; os._exit(7)", (RanStatus.ERROR,)),
    "a marshalled bomb": ("import marshal; marshal.loads(b'\\xfb' * 99)", (RanStatus.ERROR,)),
    "no program": ("", (RanStatus.OK,)),
    "no Python": ("\x00\x01 <answer>", (RanStatus.ERROR,)),
}

ENDS = {name: (program, _ENDS) for name, program in REFUSED.items()} | ENDED
