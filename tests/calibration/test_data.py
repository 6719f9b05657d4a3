"""Calibration data: files, folders, images and functions as the calls of a model file."""

import numpy as np
import pytest

from hodec.calibration.data import InputSpec, load_samples
from hodec.calibration.images import Pixels
from hodec.errors import DataError

F, WHOLE = np.dtype("float32"), np.dtype("int64")
X = InputSpec("x", F, (None, 3, 4, 5))


def arrays(n, *size, seed=0):
    return np.random.default_rng(seed).standard_normal((n, *size)).astype(np.float32)


def test_an_array_is_cut_into_calls(tmp_path):
    x = arrays(20, 3, 4, 5)
    np.save(tmp_path / "x.npy", x)
    samples = load_samples(tmp_path / "x.npy", [X])
    assert len(samples) == 20
    np.testing.assert_array_equal(np.concatenate([call["x"] for call in samples.calls]), x)


def test_calls_have_the_size_that_the_file_fixes():
    samples = load_samples({"x": arrays(12, 3, 4, 5)}, [InputSpec("x", F, (4, 3, 4, 5))])
    assert samples.counts == (4, 4, 4)
    with pytest.raises(DataError, match="count the same samples, in calls of 4"):
        load_samples({"x": arrays(13, 3, 4, 5)}, [InputSpec("x", F, (4, 3, 4, 5))])


def test_states_and_scalars_are_the_same_in_all_calls():
    specs = [InputSpec("x", F, (1, 6)), InputSpec("h", F, (2, 1, 4)), InputSpec("sr", WHOLE, ())]
    state = arrays(2, 1, 4)
    samples = load_samples({"x": arrays(9, 6), "h": state}, specs, values={"sr": 16000})
    assert samples.counts == (1,) * 9
    for call in samples.calls:
        np.testing.assert_array_equal(call["h"], state)
        assert call["sr"].shape == ()
        assert call["sr"].dtype == np.int64
        assert call["sr"] == 16000


def test_a_state_of_its_own_for_each_call_has_an_axis_more():
    specs = [InputSpec("x", F, (1, 6)), InputSpec("h", F, (2, 1, 4))]
    states = arrays(9, 2, 1, 4)
    samples = load_samples({"x": arrays(9, 6), "h": states}, specs)
    np.testing.assert_array_equal(samples.calls[3]["h"], states[3])


def test_a_folder_holds_one_call_a_file_of_any_size(tmp_path):
    for k in range(8):
        np.savez(tmp_path / f"{k}.npz", x=arrays(1, 3, 4, 5 + k))
    samples = load_samples(tmp_path, [InputSpec("x", F, (None, 3, 4, None))])
    assert [call["x"].shape[3] for call in samples.calls] == list(range(5, 13))


def test_a_sample_in_a_file_gets_its_batch_axis(tmp_path):
    for k in range(8):
        np.save(tmp_path / f"{k}.npy", arrays(3, 4, 5, seed=k))
    assert load_samples(tmp_path, [X]).calls[0]["x"].shape == (1, 3, 4, 5)


def test_a_function_gives_dicts(tmp_path):
    (tmp_path / "loader.py").write_text(
        "import numpy as np\ndef batches():\n    return ({'x': np.full((5, 3, 4, 5), k, 'f')} for k in range(3))\n"
    )
    samples = load_samples(f"{tmp_path}/loader.py:batches", [X])
    assert len(samples) == 15
    assert len(samples.calls) > 3  # three calls could not be split


@pytest.mark.parametrize(("size", "spec"), [
    ((1, 6, 8, 3), InputSpec("x", F, (None, 6, 8, 3))),
    ((1, 3, 6, 8), InputSpec("x", F, (1, 3, 6, 8))),
    ((1, 1, 6, 8), InputSpec("x", F, (1, 1, 6, 8))),
])  # fmt: skip
def test_images_take_the_layout_of_the_input(tmp_path, size, spec):
    image = pytest.importorskip("PIL.Image")
    for k in range(9):
        image.new("RGB", (16, 12), (10 * k, 20, 30)).save(tmp_path / f"{k}.png")
    samples = load_samples(tmp_path, [spec], pixels=Pixels((10.0,), (2.0,)))
    assert samples.calls[0]["x"].shape == size
    assert "(pixel - 10) / 2" in samples.words
    if 3 in size[1:]:
        channels = samples.calls[8]["x"].reshape(-1)[:: 48 if size[1] == 3 else 1][:3]
        np.testing.assert_allclose(channels, [(80 - 10) / 2, 5, 10])
        flipped = load_samples(tmp_path, [spec], pixels=Pixels((10.0,), (2.0,), "bgr")).calls[8]["x"]
        np.testing.assert_allclose(flipped.reshape(-1)[:: 48 if size[1] == 3 else 1][:3], [10, 5, 35])


def test_the_split_is_a_third_and_knows_no_order():
    samples = load_samples({"x": arrays(60, 3, 4, 5)}, [InputSpec("x", F, (1, 3, 4, 5))], labels=np.arange(60) % 3)
    fit, held = samples.split()
    assert (len(fit), len(held)) == (40, 20)
    assert len(set(np.concatenate(held.labels))) == 3
    given = {call["x"].tobytes() for call in samples.calls}
    parts = [{call["x"].tobytes() for call in part.calls} for part in (fit, held)]
    assert parts[0] | parts[1] == given
    assert not parts[0] & parts[1]
    at = next(k for k, call in enumerate(samples.calls) if call["x"].tobytes() == held.calls[5]["x"].tobytes())
    assert held.labels[5] == at % 3


def test_eight_samples_can_be_split():
    fit, held = load_samples({"x": arrays(8, 3, 4, 5)}, [X]).split()
    assert (len(fit), len(held)) == (4, 4)


BAD = np.full((9, 3, 4, 5), np.nan, np.float32)


@pytest.mark.parametrize(("given", "words"), [
    ({"x": arrays(7, 3, 4, 5)}, "7 samples given; allowed: 8 or more"),
    ({"x": BAD}, "x of call 0 holds NaN or Inf"),
    ({"x": arrays(9, 3, 4, 6)}, r"has shape \[1, 3, 4, 6\]; the model takes \['any', 3, 4, 5\]"),
    ({"y": arrays(9, 3, 4, 5)}, "input x is not in it; it has y"),
    ({"x": arrays(9, 3, 4, 5), "z": arrays(9, 1)}, "z is no input of the model"),
    ("nowhere.npz", "nowhere.npz does not exist"),
    ("nowhere.py:f", "nowhere.py does not exist"),
    ([{"x": arrays(4, 3, 4, 5)}, 3], "gives int; allowed: dicts"),
])  # fmt: skip
def test_data_that_will_not_do(given, words):
    with pytest.raises(DataError, match=words):
        load_samples(given, [X])


def test_files_that_will_not_do(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no array")
    with pytest.raises(DataError, match="cannot be read as .npz"):
        load_samples(tmp_path / "x.npz", [X])
    (tmp_path / "bad.py").write_text("def f():\n    raise KeyError('lost')\n")
    with pytest.raises(DataError, match="the function fails: KeyError"):
        load_samples(f"{tmp_path}/bad.py:f", [X])
    with pytest.raises(DataError, match="has no function g"):
        load_samples(f"{tmp_path}/bad.py:g", [X])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no .npz, .npy or images"):
        load_samples(tmp_path / "empty", [X])


def test_whole_numbers_must_fit_their_type():
    spec = InputSpec("t", np.dtype("int32"), (None, 4))
    tokens = np.arange(40, dtype=np.int64).reshape(10, 4)
    assert load_samples({"t": tokens}, [spec]).calls[0]["t"].dtype == np.int32
    with pytest.raises(DataError, match="numbers that the model's int32 cannot hold"):
        load_samples({"t": tokens + 0.5}, [spec])


def test_labels_are_one_row_a_sample():
    with pytest.raises(DataError, match="one row for each of the 9 samples"):
        load_samples({"x": arrays(9, 3, 4, 5)}, [X], labels=np.arange(8))
