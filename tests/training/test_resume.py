"""A training that is stopped or killed at any moment: it goes on bit for bit, or says why not."""

import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import QUICK, jpeg, write_pairs

from mmalign import files, load_model
from mmalign.cli.main import main
from mmalign.errors import ConfigError, TrainingError, UsageError
from mmalign.locks import sole_user
from mmalign.model import checkpoint
from mmalign.training.learner import Learner
from mmalign.training.optimization import Arithmetic, Average
from mmalign.training.runlog import RunLog
from mmalign.training.train import TrainConfig, train
from mmalign.training.trainer import Trainer

# Nine steps; a validation, and so a saved state, after each third.
CONFIG = replace(
    QUICK, preset="pico", batch_size=4, epochs=3, validations=3, caption_loss=0.2, word_loss=0.3,
    seed=5,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("pico")
Data = tuple[Path, Path]


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture(scope="module")
def data(pico: str, tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    held = write_pairs(folder / "val", 3)
    for file in sorted(held.iterdir()):  # other pictures than those to train on
        if file.suffix == ".jpg":
            file.write_bytes(jpeg(100 + int(file.stem)))
    return write_pairs(folder / "pairs", 13), held


@pytest.fixture(scope="module")
def whole(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing ever stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    begin(data, run)
    return run


@pytest.fixture(scope="module")
def halfway(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed behind its first saved state. Tests that go on with it copy it."""
    folder = tmp_path_factory.mktemp("half")
    with killed_in(folder / "run", Learner, "step", 4):
        begin(data, folder / "run")
    return folder / "run"


def begin(data: Data, run: Path, config: TrainConfig = CONFIG) -> None:
    train([str(data[0])], run, config, val=[str(data[1])])


def go_on(run: Path, config: TrainConfig = CONFIG) -> dict[str, Any]:
    return train([], run, config, resume=True)


def copy(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "run")
    return folder / "run"


@contextmanager
def calling(owner: Any, name: str, at: int, act: Callable[[], None]) -> Iterator[None]:
    """Do something just before the call with a number of some function."""
    original, calls = getattr(owner, name), []

    def called(*args: Any, **words: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            act()
        return original(*args, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, called)
        yield


@contextmanager
def killed_in(run: Path, owner: Any, name: str, at: int) -> Iterator[None]:
    """Kill the process before a call: what is on the disk at that moment is all that is left."""
    left = run.with_name("left")

    def kill() -> None:
        shutil.copytree(run, left)
        raise Killed

    with calling(owner, name, at, kill), suppress(Killed):
        yield
    assert left.exists(), "never called that often"
    shutil.rmtree(run)
    left.rename(run)


def same_run(one: Path, other: Path) -> bool:
    """Compare model, last weights, their average and the optimizer bit for bit."""
    states = [torch.load(run / "state.pt") for run in (one, other)]
    for name in ("towers", "words", "average"):
        a, b = (state[name] for state in states)
        if not all(torch.equal(a[k], b[k]) for k in a):
            return False
    moments = [state["optimizer"]["state"] for state in states]
    return (
        load_model(one).identity == load_model(other).identity
        and all(
            torch.equal(moments[0][i]["exp_avg_sq"], m["exp_avg_sq"]) for i, m in moments[1].items()
        )
        and states[0]["step"] == states[1]["step"] == 9
        and states[0]["best_step"] == states[1]["best_step"]
    )


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (Learner, "step", 1),
        (Learner, "step", 3),
        (Average, "update", 5),  # the weights have moved, their average has not
        (Trainer, "validate", 2),
        (Trainer, "save", 2),  # better weights are the model already
        (files, "move", 9),  # something is written and has no name yet
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    owner: Any, name: str, at: int, data: Data, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with killed_in(run, owner, name, at):
        begin(data, run)
    go_on(run)
    assert same_run(run, whole)
    assert steps_of(run) == steps_of(whole)
    assert not (run / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_between_two_steps(
    number: signal.Signals, data: Data, whole: Path, tmp_path: Path
) -> None:
    run, before = tmp_path / "run", signal.getsignal(number)
    with (
        calling(Average, "update", 5, lambda: os.kill(os.getpid(), number)),
        pytest.raises(KeyboardInterrupt),
    ):
        begin(data, run)
    assert torch.load(run / "state.pt")["step"] == 5
    assert signal.getsignal(number) is before
    go_on(run)
    assert same_run(run, whole)


@pytest.mark.slow
def test_a_second_signal_saves_nothing_of_a_half_done_step(
    data: Data, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with calling(Average, "update", 5, twice), pytest.raises(KeyboardInterrupt):
        begin(data, run)
    assert "saved at step 3" in capsys.readouterr().err
    assert torch.load(run / "state.pt")["step"] == 3
    go_on(run)
    assert same_run(run, whole)


def test_a_run_killed_before_it_saved_can_be_started_again(
    data: Data, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with killed_in(run, Learner, "step", 2):
        begin(data, run)
    begin(data, run)
    assert same_run(run, whole)


def test_a_stopped_run_is_resumed_by_the_command_that_it_prints(
    data: Data,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing has to be said again, in whichever folder; what is said is written down."""
    monkeypatch.chdir(data[0].parent)
    run, shell = tmp_path / "my run", CliRunner()
    with (
        calling(Average, "update", 5, lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(KeyboardInterrupt),
    ):
        train(["pairs"], run, CONFIG, val=["val"])
    (command,) = re.findall("`mmalign (.+)`", capsys.readouterr().err)
    monkeypatch.chdir(tmp_path)
    more = shell.invoke(main, [*shlex.split(command), "--set", "weight_decay=0.4"])
    assert more.exit_code == 0, more.output
    assert "weight_decay = 0.4" in (run / "config.toml").read_text()
    assert torch.load(run / "state.pt")["step"] == 9
    longer = shell.invoke(main, shlex.split(command))
    assert longer.exit_code == 2
    assert "it reached epochs=3; to continue, raise the limit with --set epochs=N" in longer.stderr


def test_the_limit_that_ends_a_run_is_named_and_remembered(whole: Path, tmp_path: Path) -> None:
    run, shell = copy(whole, tmp_path), CliRunner()
    words = ["train", "--out", str(run), "--resume", "--set"]
    said = shell.invoke(main, [*words, "minutes=0.0001"])
    assert said.exit_code == 2
    raised = "to continue, raise the limit with --set epochs=N"
    assert f"it reached epochs=3 and minutes=0.0001; {raised} --set minutes=N" in said.output
    said = shell.invoke(main, [*words, "minutes=1000"])
    assert f"it reached epochs=3; {raised}" in said.output
    longer = shell.invoke(main, [*words, "epochs=4", "--set", "minutes=1000"])
    assert longer.exit_code == 0, longer.output
    text = (run / "config.toml").read_text()
    assert "epochs = 4" in text
    assert "minutes = 1000" in text


def change_picture(folder: Path) -> None:
    (folder / "004.jpg").write_bytes(jpeg(77))


def change_caption(folder: Path) -> None:
    (folder / "004.json").write_text('{"captions": ["another"]}')


def add_picture(folder: Path) -> None:
    (folder / "0000.jpg").write_bytes(jpeg(77))
    (folder / "0000.json").write_text('{"captions": ["a new one"]}')


def remove_picture(folder: Path) -> None:
    (folder / "004.jpg").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_picture, "1 images have changed .*004.jpg"),
        (change_caption, "1 samples are new or have other captions .*004.jpg.*, 1 are gone"),
        (add_picture, "1 samples are new or have other captions .*0000.jpg.*, 0 are gone"),
        (remove_picture, "0 samples are new or have other captions, 1 are gone"),
    ],
)
def test_a_run_is_not_resumed_with_other_data(
    change: Callable[[Path], None], message: str, data: Data, halfway: Path, tmp_path: Path
) -> None:
    run = copy(halfway, tmp_path)
    moved = tmp_path / "pairs"
    shutil.copytree(data[0], moved)
    change(moved)
    before = (run / "state.pt").read_bytes()
    with pytest.raises(TrainingError, match=f"cannot be resumed, as its data .*{message}"):
        train([str(moved)], run, CONFIG, resume=True)
    with pytest.raises(TrainingError, match="cannot be resumed, as its data"):
        train([], run, CONFIG, val=[str(moved)], resume=True)
    assert (run / "state.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_picture, "1 images have changed .*004.jpg"),
        (add_picture, "1 samples are new or have other captions .*0000.jpg.*, 0 are gone"),
        (None, "samples are new|validation samples now"),
    ],
)
def test_a_run_without_validation_is_not_resumed_with_other_data_either(
    change: Callable[[Path], None] | None, message: str, data: Data, tmp_path: Path
) -> None:
    run, pairs = tmp_path / "run", tmp_path / "pairs"
    shutil.copytree(data[0], pairs)
    with killed_in(run, Learner, "step", 4):
        train([str(pairs)], run, replace(CONFIG, held_out=0))
    val = [] if change else [str(data[1])]
    if change:
        change(pairs)
    with pytest.raises(TrainingError, match=f"cannot be resumed, as its data .*({message})"):
        train([], run, replace(CONFIG, held_out=0), val=val, resume=True)


def test_data_that_was_moved_and_touched_is_the_same(
    data: Data, halfway: Path, whole: Path, tmp_path: Path
) -> None:
    run = copy(halfway, tmp_path)
    moved = tmp_path / "pairs"
    shutil.copytree(data[0], moved)
    for file in moved.iterdir():
        os.utime(file, (1e9, 1e9))
    train([str(moved)], run, CONFIG, resume=True)
    assert same_run(run, whole)


@pytest.mark.parametrize(
    "change", [{"preset": "tiny"}, {"batch_size": 8}, {"seed": 1}, {"caption_keys": ("title",)}]
)
def test_what_makes_another_training_is_refused(
    change: dict[str, Any], halfway: Path, tmp_path: Path
) -> None:
    name = next(iter(change))
    with pytest.raises(ConfigError, match=f"{name} cannot be changed when a run is resumed"):
        go_on(copy(halfway, tmp_path), replace(CONFIG, **change))


@pytest.mark.slow
def test_the_arithmetic_is_measured_once(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = tmp_path / "run", replace(CONFIG, arithmetic="auto")
    chosen = Arithmetic(channels_last=True)
    monkeypatch.setattr("mmalign.training.learner.fastest_arithmetic", lambda *_, **__: chosen)
    with killed_in(run, Learner, "step", 4):
        begin(data, run, config)
    begin(data, tmp_path / "whole", config)
    monkeypatch.setattr("mmalign.training.learner.fastest_arithmetic", None)
    go_on(run, config)
    assert torch.load(run / "state.pt")["arithmetic"]["image"]["channels_last"]
    assert same_run(run, tmp_path / "whole")


@pytest.mark.parametrize(
    ("part", "value", "lacking"),
    [
        ("arithmetic", {"image": {"bfloat16": True}, "text": {}}, "bfloat16"),
        ("machine", {"device": "cuda", "torch": "", "threads": 1}, "cuda"),
    ],
)
def test_an_arithmetic_that_a_machine_lacks_is_named(
    part: str,
    value: dict[str, Any],
    lacking: str,
    halfway: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = copy(halfway, tmp_path)
    state = torch.load(run / "state.pt") | {part: value}
    torch.save(state, run / "state.pt")
    monkeypatch.setattr("mmalign.training.learner.has_bfloat16", lambda _: False)
    monkeypatch.setattr("mmalign.training.learner.fastest_device", lambda: torch.device("cpu"))
    with pytest.raises(TrainingError, match=f"with {lacking}.*--set arithmetic=float32") as caught:
        go_on(run, CONFIG)
    assert "\n" not in str(caught.value)
    assert go_on(run, replace(CONFIG, arithmetic="auto"))["step"] == 9


def test_a_damaged_state_is_one_line(halfway: Path, tmp_path: Path) -> None:
    run = copy(halfway, tmp_path)
    (run / "state.pt").write_bytes((run / "state.pt").read_bytes()[:1000])
    with pytest.raises(TrainingError, match="state.pt: damaged") as caught:
        go_on(run)
    assert "\n" not in str(caught.value)
    torch.save({"step": 3}, run / "state.pt")
    with pytest.raises(TrainingError, match="from an earlier version"):
        go_on(run)


def test_two_trainings_do_not_share_a_folder(data: Data, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with sole_user(run), pytest.raises(UsageError, match="another process is training"):
        begin(data, run)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_costs_no_state(
    data: Data, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def fill() -> None:
        raise OSError(28, "No space left on device")

    for owner, name in ((checkpoint, "save_file"), (torch, "save")):
        with calling(owner, name, 2, fill), pytest.raises(OSError, match="No space") as caught:
            begin(data, run)
        assert str(run) in str(caught.value.filename)
        go_on(run)
        assert same_run(run, whole)
        shutil.rmtree(run)


def test_contents_that_were_never_read_are_not_taken_for_changed_ones(
    halfway: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without room on the disk images are decoded again and again, and not read before."""
    run = copy(halfway, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmalign.data.pixels.DISK_SHARE", 0)
        go_on(run)
    assert "warning: 13 images are not checked for changes" in capsys.readouterr().err
    assert same_run(run, whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full disk at hand")
def test_a_disk_that_takes_no_events_is_an_error_with_the_name_of_their_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As TensorBoard's own writer would not: it has a thread, with a traceback."""
    log, row = RunLog(tmp_path), {"step": 1, "loss": 0.5}
    log.write(row)
    log.events.file.close()
    log.events.file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as caught:
        log.write(row)
    log.close()
    assert caught.value.filename == str(log.events.path)
    assert capfd.readouterr().err == ""


def test_tensorboard_reads_what_is_logged_and_forgets_what_was_taken_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin, loss in ((0, 0.5), (1, 0.25)):
        log = RunLog(tmp_path, begin)
        for step in (1, 2, 3)[begin:]:
            log.write({"step": step, "loss": loss})
        log.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(1, 0.5), (2, 0.25), (3, 0.25)]
    assert steps_of(tmp_path) == [1, 2, 3]


def test_training_leaves_the_random_numbers_of_its_caller(data: Data, tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    begin(data, tmp_path / "run", replace(CONFIG, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)
