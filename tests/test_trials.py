"""One list of trials: each place once, whoever comes, whatever happens to him, and whatever wrote the list."""

import math
import time
from collections import Counter

import optuna
import pytest
from optuna.trial import TrialState
from processes import Process, barrier
from sqlalchemy import event

from cortexlit.core import CortexlitError, DataError
from cortexlit.training import trials
from cortexlit.training.trainer import Diverged
from cortexlit.training.trials import database, holding, open_study, run_trials

CELLS = [{"x": k} for k in range(4)]
KINDS = pytest.mark.parametrize("places", [CELLS, 4], ids=["fixed", "drawn"])


def suggest(trial) -> dict:
    return {"x": trial.suggest_int("x", 0, 999)}


def drawn(place: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(place)


def study_in(folder, name="list.log") -> optuna.Study:
    return open_study(
        f"journal:///{folder / name}" if name.endswith("log") else database(folder / name), "trials"
    )


def run(study, places, work=lambda params, trial: float(params["x"]), **options) -> None:
    run_trials(study, places, suggest, work, **{"sampler": drawn, "wait": 0.05} | options)


def results(study) -> list:
    "What holds the places, in any order of trials."
    return sorted((t.params["x"], t.state.name) for t in holding(study))


def surplus(study) -> list[int]:
    return [t.number for t in study.trials if t.user_attrs.get("surplus")]


@pytest.fixture
def undisturbed(places, tmp_path) -> list:
    study = study_in(tmp_path, "undisturbed.log")
    run(study, places)
    assert len(study.trials) == len(holding(study)) == 4
    return results(study)


@KINDS
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), DataError("wrong data")])
def test_an_error_ends_the_worker_and_its_trial_is_run_by_the_next(places, error, undisturbed, tmp_path):
    study, calls = study_in(tmp_path), []

    def fails(params, trial):
        calls.append(params["x"])
        if len(calls) == 2:
            raise error
        return float(params["x"])

    with pytest.raises(type(error)):
        run(study, places, fails)
    run(study_in(tmp_path), places, fails)
    assert results(study) == undisturbed and len(calls) == 5 and calls.count(calls[1]) == 2
    assert Counter(t.state for t in study.trials) == {TrialState.COMPLETE: 4, TrialState.FAIL: 1}
    run(study_in(tmp_path), places, fails)
    assert len(calls) == 5


@KINDS
@pytest.mark.parametrize("how", ["diverged", "pruned", "no value"])
def test_what_is_given_up_holds_its_place_and_says_so(places, how, undisturbed, tmp_path, capsys):
    study, calls = study_in(tmp_path), []

    def gives_up(params, trial):
        calls.append(params["x"])
        if len(calls) == 2 and how != "no value":
            raise (
                Diverged("the loss is not finite")
                if how == "diverged"
                else optuna.TrialPruned("after epoch 1")
            )
        return math.nan if len(calls) == 2 else float(params["x"])

    run(study, places, gives_up, told=lambda params, trial: f"trial {trial.number}")
    run(study_in(tmp_path), places, gives_up)
    assert len(calls) == 4 and [t.state for t in study.trials].count(TrialState.PRUNED) == 1
    assert [x for x, _ in results(study)] == [x for x, _ in undisturbed]
    lines = capsys.readouterr().out.splitlines()
    why = {"diverged": "the loss is not finite", "pruned": "after epoch 1", "no value": "with no value"}[how]
    assert lines[1] == f"trial 1: given up {why}" and len(lines) == 4
    assert lines[0] == f"trial 0: validation correlation {calls[0]:.4f}"


@KINDS
def test_who_comes_too_late_for_the_last_one_steps_back(places, tmp_path):
    "Another worker takes it after we have looked; what Optuna then gives us is a place of nobody."
    study, calls = study_in(tmp_path), []
    last = places[:1] if isinstance(places, list) else 1

    def other() -> None:
        if not holding(study) or not study.get_trials(states=(TrialState.COMPLETE,)):
            trial = study.ask()
            study.tell(trial, float(suggest(trial)["x"]))

    run(study, last, lambda params, trial: calls.append(params) or 0.0, before=other)
    assert not calls and surplus(study) == [1] and len(holding(study)) == 1


@KINDS
def test_queued_by_two_and_run_once(places, tmp_path):
    study, calls = study_in(tmp_path), []

    def fails(params, trial):
        raise OSError("disk full")

    with pytest.raises(OSError):
        run(study, places, fails)
    [failed] = [t for t in study.trials if t.state == TrialState.FAIL]
    for _ in range(2):  # as two workers do who look at the same moment
        study.enqueue_trial(failed.params, user_attrs={"again": failed.number})
    run(study, places, lambda params, trial: calls.append(params["x"]) or 0.0)
    assert len(calls) == len(holding(study)) == 4 and len(surplus(study)) == 1
    run(study, places, fails)  # nothing is left


@KINDS
def test_more_places_go_on_and_fewer_are_nothing_to_do(places, tmp_path):
    study, whole = study_in(tmp_path), study_in(tmp_path, "whole.log")
    run(study, places[:2] if isinstance(places, list) else 2)
    run(study, places)
    run(study, places[1:2] if isinstance(places, list) else 1)
    run(whole, places)
    assert results(study) == results(whole) and len(study.trials) == 4
    with pytest.raises(DataError, match="no places"):
        run(study, [] if isinstance(places, list) else 0)


def test_a_duplicate_that_an_earlier_version_gave_up_holds_no_place(tmp_path):
    study = study_in(tmp_path)
    x = {"x": optuna.distributions.IntDistribution(0, 999)}
    made = [(0, TrialState.COMPLETE, {}), (1, TrialState.PRUNED, {}), (2, TrialState.PRUNED, {"folder": "f"})]
    for k, state, notes in made:
        value = 0.0 if state == TrialState.COMPLETE else None
        study.add_trial(
            optuna.create_trial(state=state, value=value, params={"x": k}, distributions=x, user_attrs=notes)
        )
    calls = []
    run(study, CELLS, lambda params, trial: calls.append(params["x"]) or 0.0)
    assert calls == [1, 3]


def shares(folder, places, moment) -> None:
    study = study_in(folder, "list.db")
    moment.wait(200)
    run(study, places, lambda params, trial: print(params["x"], flush=True) or float(params["x"]))


@pytest.mark.parametrize("places", [[{"x": k} for k in range(10)], 10], ids=["fixed", "drawn"])
def test_two_workers_share_a_list(places, tmp_path):
    moment = barrier(2)
    workers = [Process(tmp_path, shares, tmp_path, places, moment) for _ in range(2)]
    codes, told = zip(*(worker.ended() for worker in workers), strict=True)
    assert codes == (0, 0), told
    study, alone = study_in(tmp_path, "list.db"), study_in(tmp_path)
    run(alone, places)
    begun = sorted(int(line) for out in told for line in out.splitlines())
    assert begun == [x for x, _ in results(study)] == [x for x, _ in results(alone)]


def test_a_trial_in_a_journal_without_a_sign_of_life_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "_HEARTBEAT", 0.05)
    study = optuna.create_study(storage=trials.open_storage(f"journal:///{tmp_path / 'a.log'}"))
    other = optuna.load_study(
        study_name=study.study_name, storage=trials.open_storage(f"journal:///{tmp_path / 'a.log'}")
    )
    lost, silent, alive = study.ask(), study.ask(), study.ask()
    study._storage.record_heartbeat(lost._trial_id)  # dead after one sign of life, before one, and not at all
    for _ in range(8):
        study._storage.record_heartbeat(alive._trial_id)
        trials.fail_lost(other, {})
        time.sleep(0.05)
    assert [t.state for t in other.trials] == [TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING]
    assert silent._trial_id != lost._trial_id


@pytest.mark.parametrize(
    "storage", ["journal:x.log", "journal:///", "journal:///nowhere/x.log", "journal:///bad.log"]
)
def test_a_journal_that_cannot_be_had_is_named(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.log").write_text("a table, not a journal\n" * 3)
    with pytest.raises(CortexlitError, match="journal"):
        trials.open_storage(storage)
    assert (tmp_path / "bad.log").read_text().startswith("a table")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", None])
def test_the_driver_of_postgresql_that_is_installed_is_taken(driver, monkeypatch):
    monkeypatch.setattr(trials, "find_spec", lambda name: True if name == driver else None)
    monkeypatch.setattr(trials, "RDBStorage", lambda url, *args, **options: url)
    url = trials.open_storage("postgresql://me@host/grid")
    assert url == f"postgresql{f'+{driver}' if driver else ''}://me@host/grid"
    assert trials._driven("sqlite:///a.db") == "sqlite:///a.db"


def test_without_a_driver_it_is_said_what_to_install(monkeypatch):
    def fails(*args: object, **options: object) -> None:
        raise ImportError("No module named 'psycopg'")

    monkeypatch.setattr(trials, "RDBStorage", fails)
    with pytest.raises(DataError, match=r'pip install "cortexlit\[postgres\]"'):
        trials.open_storage("postgresql://me@host/grid")


def opens(moment) -> None:
    for k in range(6):
        moment.wait(200)
        trials.open_storage(f"sqlite:///{k}.db")


def test_workers_may_open_a_new_storage_in_the_same_moment(tmp_path):
    moment = barrier(2)
    openers = [Process(tmp_path, opens, moment) for _ in range(2)]
    codes, told = zip(*(opener.ended() for opener in openers), strict=True)
    assert codes == (0, 0), told


def test_a_storage_that_is_let_go_closes_its_connections(tmp_path):
    "Python 3.13 warns of a database that is swept up open, wherever it happens to sweep."
    storage, made, shut = trials.open_storage(database(tmp_path / "a.db")), [], []
    event.listen(storage.engine, "connect", lambda connection, _: made.append(connection))
    event.listen(storage.engine, "close", lambda connection, _: shut.append(connection))
    assert storage.get_all_studies() == [] and made and not shut
    del storage
    assert shut == made


def test_a_trial_without_a_sign_of_life_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "_HEARTBEAT", 1)
    study = optuna.create_study(storage=trials.open_storage(trials.database(tmp_path / "a.db")))
    lost, alive = study.ask(), study.ask()
    study._storage.record_heartbeat(alive._trial_id)
    seen: dict[int, float] = {}
    trials.fail_lost(study, seen)
    assert [t.state for t in study.trials] == [TrialState.RUNNING] * 2
    seen[lost._trial_id] -= 5
    seen[alive._trial_id] -= 5
    trials.fail_lost(study, seen)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.RUNNING]


@pytest.mark.parametrize("name", ["plain", "rank 8?", "50%20gain", "a#b", "{x}"])
def test_a_database_lies_in_its_folder_whatever_that_is_called(tmp_path, name):
    (tmp_path / name).mkdir()
    trials.open_storage(trials.database(tmp_path / name / "grid.db"))
    assert (tmp_path / name / "grid.db").is_file()
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises(DataError, match="database URL"):
        trials.open_storage(object())
