import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from farm import __version__
from farm.cli import jobs
from farm.cli.app import main
from farm.cli.exits import MEANINGS, exit_code, exit_code_of
from farm.errors import BucketMissingError, FarmError, OutOfMemoryError, PromptError, WaitingError
from tests.unit.cli.conftest import Place

HEAVY = ("torch", "diffusers", "transformers", "ray", "pyarrow", "numpy", "pydantic", "PIL", "boto3")
COMMANDS = (
    *("render", "plan", "status", "pause", "resume", "cancel", "approve", "change", "retry"),
    *("verify", "reproduce", "pull", "du", "gc", "delete", "doctor"),
)


def python(*arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "NO_COLOR": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=check)


def test_starting_the_command_imports_nothing_heavy() -> None:
    code = f"import farm.cli.app, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert python("-c", code, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["farm", "farm.cli.app"])
def test_the_command_runs_as_a_module(module: str) -> None:
    assert python("-m", module, "--version").stdout == f"farm {__version__}\n"
    wrong = python("-m", module, "status", "--jason")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--jason" in wrong.stderr


def test_importing_the_module_that_starts_it_starts_nothing() -> None:
    assert python("-c", "import farm.__main__; print('here')").stdout == "here\n"


def test_help_lists_the_commands_and_the_exit_codes(farm: Place) -> None:
    ended = farm("--help")
    assert ended.code == 0
    for name in COMMANDS:
        assert f" {name} " in ended.out
    for code in MEANINGS:
        assert f" {int(code)}  " in ended.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_takes_the_shared_flags(farm: Place, name: str) -> None:
    ended = farm(name, "--help")
    assert ended.code == 0
    for flag in ("--store", "--json", "--verbose"):
        assert flag in ended.out


def test_version(farm: Place) -> None:
    assert farm("--version").out == f"farm {__version__}\n"


def test_a_wrong_flag_is_one_line(farm: Place) -> None:
    ended = farm("status", "--jason")
    assert ended.code == 2
    assert ended.out == ""
    assert ended.error.startswith("No such option: --jason")
    assert ended.err.count("\n") == 1


def test_no_command_at_all_shows_the_help_and_no_error(farm: Place) -> None:
    ended = farm()
    assert ended.code == 2
    assert "Render a manifest" in ended.out
    assert ended.err == ""


def test_a_misspelt_variable_is_refused_and_a_foreign_one_is_not(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_ANIMALS", "12")
    assert farm("status").code == 0
    monkeypatch.setenv("FARM_STOER", "s3://bucket")
    ended = farm("status")
    assert ended.code == 2
    assert ended.error == "variable FARM_STOER is no setting; did you mean FARM_STORE?"


def test_an_unknown_key_in_farm_toml_is_named_with_the_nearest(farm: Place) -> None:
    farm.write("farm.toml", 'stoer = "x"')
    assert farm("status").error == "farm.toml: unknown key stoer; did you mean store?"


def test_a_locale_without_unicode_ends_no_command(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["models"]) == 0
    assert main(["models", "--json"]) == 0
    printed = sys.stdout.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "\\xd7" in printed
    assert json.loads(printed[printed.index("{") :])["models"]


def test_a_wrong_flag_beside_json_is_json(farm: Place) -> None:
    ended = farm("verify", "--json")
    assert ended.code == 2
    assert json.loads(ended.out)["error"]["code"] == "usage"


def test_a_wrong_setting_names_itself(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_VRAM_GIB", "-3")
    ended = farm("status")
    assert ended.code == 2
    assert ended.error.startswith("setting vram_gib: Input should be greater than 0, got '-3'; mend FARM_VRAM_GIB")


def test_errors_have_the_exit_code_of_their_nearest_kind() -> None:
    assert exit_code(PromptError("x")) == 2
    assert exit_code(BucketMissingError("x")) == 3
    assert exit_code(OutOfMemoryError("x")) == 4
    assert exit_code(WaitingError("x")) == 9
    assert exit_code_of("bucket_missing") == 3
    assert exit_code_of("no such code") == 1


def test_every_error_of_the_farm_has_an_exit_code() -> None:
    kinds = FarmError.__subclasses__()
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
        assert exit_code(kind("x")) != 1, kind


def test_an_error_that_should_not_be_is_one_line_and_code_1() -> None:
    code = (
        "import farm.cli.options as options, farm.cli.app as app\n"
        "options.Options.open_ledger = lambda self, settings=None: {}['gone']\n"
        "raise SystemExit(app.main(['status']))"
    )
    ended = python("-c", code)
    assert ended.returncode == 1
    assert ended.stderr == "error: unexpected KeyError: 'gone'; run again with -v for the traceback\n"
    told = python("-c", code.replace("'status'", "'status', '--json'"))
    assert json.loads(told.stdout)["error"]["code"] == "unexpected"
    loud = python("-c", code.replace("'status'", "'status', '-v'"))
    assert "Traceback (most recent call last)" in loud.stderr


def test_what_aborts_while_the_interpreter_is_taken_down_changes_no_exit_code() -> None:
    code = "import atexit, os; from farm.cli import app; atexit.register(os.abort); app.run()"
    ended = python("-c", code, "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"farm {__version__}\n", "")
    assert python("-c", code, "rendre").returncode == 2


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import os, sys, farm.cli.app as app\n"
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)\n"
        "raise SystemExit(app.main(['models']))"
    )
    ended = python("-c", code)
    assert ended.returncode == 141
    assert ended.stderr == ""


def test_ctrl_c_ends_a_command_with_code_130(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "_all_jobs", interrupted)
    ended = farm("status")
    assert (ended.code, ended.error) == (130, "interrupted")


def test_no_colour_reaches_a_pipe(farm: Place) -> None:
    assert "\x1b" not in farm("models").out
