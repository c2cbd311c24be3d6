"""`python -m maestro_jax.doctor`: every finding on a line with its cure, exit code 0 or 78."""

import base64
import http.server
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from PIL import Image

from maestro_jax import api
from maestro_jax.policy.tokens import train_tokens

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.py"
SUITE = "data: the suite is built when a run starts"
READY = [f'expert "{name}": ready' for name in ("Glyph-Reader", "Chart-Lens", "Shape-Sight", "Tally", "Sym-Solver")]


def command(config: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Exit code, printed lines, and what was written to stderr."""
    argv = [sys.executable, "-m", "maestro_jax.doctor", f"--config={config}", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=variables, cwd=ROOT)
    return done.returncode, done.stdout.splitlines(), done.stderr


def doctor(config: Path, seconds: float = 60.0, static: bool = False) -> tuple[bool, list[str]]:
    """The same in this process: whether all is well, and the lines."""
    lines: list[str] = []
    found = api.doctor(config, seconds=seconds, static=static, tell=lines.append)
    return not found.problems, lines


def written(path: Path, *changes: str) -> Path:
    """A quickstart config that is changed by a few lines."""
    lines = ["from configs import quickstart", "def get_config():", "    config = quickstart.get_config()"]
    lines += ["    registry = config.registry", *(f"    {change}" for change in changes), "    return config"]
    file = path / "changed.py"
    file.write_text("\n".join(lines))
    return file


SERVED = textwrap.dedent("""
    registry.experts += ({{"name": "Far", "description": "d", "endpoints": ("http://127.0.0.1:{port}/v1",),
    "model": "m", "key": "{key}"}},)
""").replace("\n", " ")


def test_a_sound_registry_is_ready() -> None:
    code, lines, errors = command(QUICKSTART)
    assert code == 0, errors
    assert lines == ["config: 5 experts, 4 services, 7 skills, 0 problems", SUITE, *READY]


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    config = written(
        tmp_path,
        "registry.services = registry.services[1:]",
        'registry.skills[2]["children"] = ("Text_Recognition", "Key_Informations")',
        'registry.show = ("prize",)',
        SERVED.format(port=9, key="NO_SUCH_KEY").strip(),
    )
    code, lines, errors = command(config)
    assert code == 78
    assert lines == [
        'skill "Chart_Problem_Solver" stage 1 ("ocr"): unknown service "ocr"; valid: zoom, detect, caption',
        'skill "OCR_Problem_Solver": unknown child "Key_Informations"; did you mean "Key_Information"?',
        'skill "Geometric_Problem_Solver" stage 2 ("ocr"): unknown service "ocr"; valid: zoom, detect, caption',
        'registry.show has "prize"; did you mean "price"?',
        'expert "Far": environment variable NO_SUCH_KEY is not set; export it with the API key',
        "config: 6 experts, 3 services, 7 skills, 5 problems",
    ]
    assert errors.strip() == f"error: 5 problems in {config}; the lines above say what to do about each"


def test_what_experts_up_would_refuse_is_told_too(tmp_path: Path) -> None:
    def local(name: str, words: str, *ports: int, host: str = "127.0.0.1") -> str:
        urls = "".join(f'"http://{host}:{port}/v1",' for port in ports)
        entry = f'{{"name": "{name}", "description": "d", "endpoints": ({urls}), "model": "m", "serve": {words}}}'
        return f"registry.experts += ({entry},)"

    config = written(
        tmp_path,
        local("One", '("vllm",)', 1, 2),
        local("Away", '("vllm",)', 3, host="example.org"),
        local("Odd", '("vllm", "{prot}")', 4),
    )
    well, lines = doctor(config, static=True)
    assert not well and lines[:-1] == [
        'expert "One": serve starts a server for each endpoint; let it take {port}',
        'expert "Away": serve starts servers on this machine, and http://example.org:3/v1 is another; remove serve',
        'expert "Odd": serve has {prot}; it can have {host}, {port} and {model}',
    ]
    config = written(tmp_path, local("One", '("vllm",)', 1), local("Two", '("sglang",)', 1))
    well, lines = doctor(config, static=True)
    assert not well and lines[:-1] == [
        'expert "Two" and expert "One" serve http://127.0.0.1:1/v1 by other commands; keep one'
    ]


def test_an_expert_that_is_not_there_is_named_and_its_key_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", "canary-4711")
    well, lines = doctor(written(tmp_path, SERVED.format(port=9, key="FAR_KEY").strip()), seconds=5)
    assert not well and lines[1:-1] == [SUITE, *READY]
    assert lines[-1].startswith('expert "Far": ') and not lines[-1].endswith("ready")
    assert "4711" not in "".join(lines)


class ListsAndRefuses(http.server.BaseHTTPRequestHandler):
    """A server that lists the model, and takes no request for it."""

    def do_GET(self) -> None:
        self._send(200, b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        self._send(400, b"max_tokens is too large")

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *parts: object) -> None: ...


def test_an_expert_that_refuses_what_a_run_would_ask_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", "canary-4711")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ListsAndRefuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = written(tmp_path, SERVED.format(port=server.server_address[1], key="FAR_KEY").strip())
        well, lines = doctor(config)
        server.shutdown()
    assert not well and lines[1:-1] == [SUITE, *READY]
    assert "HTTP 400; the server refuses the request" in lines[-1] and "max_tokens is too large" in lines[-1]


def tasks(path: Path, *rows: dict[str, object]) -> str:
    """A setting that names a JSONL file of these rows; what they do not say is the same in all."""
    whole = [{"question": "How many?", "answers": ["3"], "source": "TallyQA"} | row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in whole))
    return f"({str(path)!r},)"


def own_data(path: Path, train: str, test: str) -> Path:
    return written(
        path, 'config.data.kind = "jsonl"', f"config.data.train_files = {train}", f"config.data.test_files = {test}"
    )


def test_the_data_is_opened_and_what_it_holds_is_told(tmp_path: Path) -> None:
    train = tasks(tmp_path / "train.jsonl", *[{}] * 3, {"source": "SLAKE"})
    well, lines = doctor(own_data(tmp_path, train, tasks(tmp_path / "test.jsonl", {})))
    assert well
    assert lines[1:3] == [
        "data: 4 tasks to train on, of TallyQA, SLAKE",
        "data: 1 task held out, of TallyQA",
    ]


def test_every_row_of_the_data_needs_a_grader(tmp_path: Path) -> None:
    """A run would end where it meets the row."""
    train = tasks(tmp_path / "train.jsonl", {}, {}, {"source": "TallyQQ"})
    well, lines = doctor(own_data(tmp_path, train, f"({str(tmp_path / 'nowhere.jsonl')!r},)"))
    assert not well and lines[3:] == READY
    assert f"{tmp_path}/train.jsonl line 3" in lines[1] and '"TallyQQ"' in lines[1]
    assert lines[2].startswith(f"data: cannot read {tmp_path}/nowhere.jsonl: No such file")


def test_a_task_that_no_prompt_can_hold_is_told(tmp_path: Path) -> None:
    """Where the tokenizer is at hand, a task of each source is made into a prompt."""
    train_tokens(["How many? 3"], 600, tmp_path / "tokenizer")
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    shown = {"bytes": base64.b64encode(picture.getvalue()).decode()}
    train = tasks(tmp_path / "train.jsonl", {}, {"source": "SLAKE", "images": [shown, shown]})
    test = tasks(tmp_path / "test.jsonl", {"question": "How many? " * 500})
    config = own_data(tmp_path, train, test)
    with config.open("a") as file:
        file.write(
            f"\ndef with_tokenizer(get=get_config):\n    config = get()\n"
            f"    config.policy.tokenizer = {str(tmp_path / 'tokenizer')!r}\n    return config\n"
            "get_config = with_tokenizer\n"
        )
    well, lines = doctor(config)
    assert not well and lines[5:] == READY
    assert lines[2].startswith("data: task train/000002 has 2 images; set config.policy.images_per_task=2")
    assert lines[4].startswith("data: the prompt of task test/000001 needs ") and "prefix_buckets" in lines[4]


def test_the_rest_of_the_run_must_fit_too(tmp_path: Path) -> None:
    well, lines = doctor(written(tmp_path, "config.grpo.group_size = 1"), static=True)
    assert not well and lines[0] == "config.grpo.group_size=1 gives no contrast; use at least 2"


def test_a_wrong_key_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(api.ConfigError) as error:
        doctor(written(tmp_path, 'registry.experts[0]["descriptoin"] = ""'))
    assert (
        str(error.value) == 'unknown key registry.experts["Glyph-Reader"].descriptoin; '
        'did you mean registry.experts["Glyph-Reader"].description?'
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('registry.experts += ({"name": "X"})', 'TypeError: can only concatenate tuple (not "dict") to tuple'),
        ("registry.expert += ()", 'Did you mean "experts" instead of "expert"?'),
        ("registry.experts +", "invalid syntax"),
    ],
)
def test_a_config_file_that_fails_is_named_with_its_line(tmp_path: Path, change: str, words: str) -> None:
    config = written(tmp_path, change)
    with pytest.raises(api.ConfigError) as error:
        doctor(config, static=True)
    said = str(error.value)
    assert said.startswith(f"the config file fails: {config} line 5: ") and said.endswith("; correct it there")
    assert words in said


def test_a_config_file_that_fails_is_one_line_of_the_command(tmp_path: Path) -> None:
    config = written(tmp_path, "registry.expert += ()")
    code, lines, errors = command(config, "--static")
    assert (code, lines) == (78, [])
    assert errors.startswith(f"error: the config file fails: {config} line 5: ") and errors.count("\n") == 1


def test_the_config_file_of_the_docs_is_sound(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "registry.md").read_text()
    example = text[text.index("from configs import maestro_4b") :].partition("```")[0]
    (tmp_path / "mine.py").write_text(example)
    assert doctor(tmp_path / "mine.py", static=True) == (
        True,
        ["config: 9 experts, 4 services, 6 skills, 0 problems"],
    )


def test_the_papers_registries_are_sound() -> None:
    for name in ("maestro", "out_of_domain"):
        well, lines = doctor(Path(f"configs/maestro_4b.py:{name}"), static=True)
        assert well, lines
