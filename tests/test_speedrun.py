import pytest

from src.experiments import speedrun


def test_each_target_is_timed_by_a_training_of_its_own(shapes, monkeypatch, capfd):
    recipe = {"model": "tiny", "batch_size": 10, "device": "cpu"}
    trainings = [(0.0, {**recipe, "epochs": 1000}), (101.0, {**recipe, "epochs": 2})]
    monkeypatch.setattr(speedrun, "TRAININGS", trainings)
    results, time_to_target = [], speedrun.time_to_target

    def remember(*given):
        results.append(time_to_target(*given))
        return results[-1]

    monkeypatch.setattr(speedrun, "time_to_target", remember)
    assert speedrun.main(["--data_dir", str(shapes)]) == 0
    low, impossible = results
    assert low["reached"] and low["avg_r1"] >= 0 and low["seconds"] > 0
    assert low["epoch"] < low["epochs"] == 1000  # it was stopped
    assert not impossible["reached"] and impossible["epochs"] == 2 and impossible["epoch"] <= 2
    printed = capfd.readouterr().out
    assert "not reached" in printed and f"{low['seconds']:.1f}" in printed


def test_a_training_that_fails(tmp_path, capfd):
    assert speedrun.main(["--data_dir", str(tmp_path / "none")]) == 1
    assert "the training ended with exit status 2" in capfd.readouterr().err


@pytest.mark.parametrize("target, recipe", speedrun.TRAININGS)
def test_the_recipes_are_settings(target, recipe):
    assert speedrun.make_settings(**recipe).model == "small" and 0 < target < 100
