"""The statistics of a greedy search: as text, as plain values."""

import json

from hodec.ranks.greedy.stats import CurvePoint, GreedyStats


def stats(layers: int = 3) -> GreedyStats:
    """The first layer is cut, the second too fragile, the others ignored."""
    names = [f"layer{i}.conv" for i in range(layers)]
    table = {n: tuple(CurvePoint((4 * r, r), r / 4, 0.75 + r / 16) for r in range(1, 4)) for n in names[:2]}
    choices: dict[str, CurvePoint | None] = {names[0]: CurvePoint((4, 1), 0.25, 0.8125)} | dict.fromkeys(names[1:])
    reasons = {names[1]: "below the threshold"} | dict.fromkeys(names[2:], "ignored by 'x'")
    return GreedyStats("macs", 0.5, 0.48, 0.8, 0.9375, 0.71, 0.48, 0.625, choices, reasons, table)


def test_the_text_has_both_scores_both_costs_every_choice_and_the_whole_table():
    text = " ".join(str(stats()).split())
    for part in (
        "macs 0.4800 of the dense net's, target 0.5",
        "score: dense 0.937500, compressed 0.710000, threshold 0.800000",
        "0.4800 of the MACs, 0.6250 of the parameters",
        "layer0.conv │ 4, 1 │ 0.2500 │ 0.812500",
        "layer1.conv │ dense: below the threshold",
        "layer2.conv │ dense: ignored by 'x'",
        "layer1.conv │ 0.250: 0.812500 0.500: 0.875000 0.750: 0.937500",
    ):
        assert part in text


def test_plain_values_survive_json():
    value = stats().to_dict()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["choices"] == {
        "layer0.conv": {"ranks": [4, 1], "ratio": 0.25, "score": 0.8125},
        "layer1.conv": None,
        "layer2.conv": None,
    }
    assert value["curves"]["layer1.conv"][2] == {"ranks": [12, 3], "ratio": 0.75, "score": 0.9375}
    assert value["baseline"] == 0.9375
