"""What each example teaches: verdicts on losses whose truth is known, and the noise below which there is none."""

import json

import numpy as np
import pytest

from mini_symposium.errors import InputError
from mini_symposium.evaluation.influence import Influence, load_influence, save_influence
from mini_symposium.run import RunDirectory

ROWS, TWINS = 8, 3


def world(effects=(), unseen=1.0, seeds=2, noise=0.002, learning=None):
    """Losses of 8 rows and 3 held-out rows: 4 before training, 3 where a row was seen, `unseen` more where it was not.

    `effects` has (left out, items, change of their loss).
    """
    drawn = np.random.default_rng(7).normal(0, noise, (seeds, ROWS, ROWS + TWINS))
    loss = np.full((seeds, ROWS, ROWS + TWINS), 3.0) + drawn
    for i in range(ROWS):
        loss[:, i, i] += np.broadcast_to(unseen, ROWS)[i]
    for i, items, change in effects:
        loss[:, i, items] += change
    named = [f"query {i}" for i in range(ROWS)], [f"twins.md:{i}" for i in range(TWINS)]
    base, numbered = [4.0] * ROWS, list(range(seeds))
    return Influence("proxy", 1e-4, 8, {}, *named, base, numbered, loss.tolist(), learning or {})


def verdicts(found):
    return list(found.summary()["verdict"])


def test_an_influence_is_the_loss_beside_that_of_most_other_adapters_and_a_row_has_none_on_itself():
    found = world([(2, [0, 5, 9], 0.3)]).by_seed
    assert np.isnan(found[:, range(ROWS), range(ROWS)]).all()
    assert found[:, 2, [0, 5, 9]] == pytest.approx(0.3, abs=0.01)
    assert found[:, [1, 3], 9] == pytest.approx(0, abs=0.01)  # the others are not said to harm because one row teaches


def test_verdicts_where_the_truth_is_known():
    everyone = list(range(ROWS + TWINS))
    harmful = [j for j in everyone if j != 1]
    effects = [(1, harmful, -0.05), (4, [6], 0.1), (7, [5], -0.03), (7, [0], 0.03)]
    found = world(effects, unseen=[0.5, 0.5, 0.1, 0.99, 0.5, 0.5, 0.5, 0.5])
    told = {1: "harms, conflicts", 2: "redundant", 3: "stands alone", 4: "teaches", 7: "conflicts, teaches"}
    assert verdicts(found) == [told.get(row, "") for row in range(ROWS)]
    assert found.carried[2:4] == pytest.approx([0.9, 0.01], abs=0.01)
    said = found.in_words()
    assert 'row 2 "query 1" harms others: without it their loss changes by -0.05' in said
    assert 'row 5 "query 4" teaches others: without it' in said and 'row 8 "query 7" teaches row 1 +0.03' in said
    assert 'row 8 "query 7" conflicts with row 6 -0.0' in said
    assert f'row 3 "query 2" is redundant: the others teach {found.carried[2]:.0%}' in said


def test_what_is_within_the_noise_has_no_verdict():
    assert set(verdicts(world([(1, [0, 3], 0.01)], unseen=0.5, noise=0.02))) == {""}
    named = [any(verdicts(pure_noise(seed))) for seed in range(400)]
    assert 0 < np.mean(named) < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def pure_noise(seed):
    found = world(unseen=0.5)
    drawn = 3.0 + np.random.default_rng(seed).normal(0, 0.01, (2, ROWS, ROWS + TWINS))
    drawn[:, range(ROWS), range(ROWS)] += 0.5
    return Influence(**{**vars(found), "loss": drawn.tolist()})


def test_one_seed_tells_no_influence_from_noise():
    found = world([(1, [0, 2, 3], -0.5)], unseen=[0.1] + [0.5] * 7, seeds=1)
    assert verdicts(found) == ["redundant"] + [""] * 7
    assert "one seed: what is noise is not known" in found.in_words()


def test_more_rows():
    learning = {"4": [4.0, 3.8], "8": [3.9, 3.6], "16": [3.8, 3.4]}
    fall, error = world(learning=learning).more_rows()
    assert fall == pytest.approx(0.15) and error == pytest.approx(0.05)
    assert (
        "twice as many rows: -0.150 ± 0.050 nats a token; three more about -0.069"
        in world(learning=learning).in_words()
    )


def test_it_is_saved_with_every_loss_and_read_again(tmp_path):
    run, found = RunDirectory(tmp_path), world([(4, [6], 0.1)])
    assert load_influence(run) is None
    save_influence(run, found)
    assert load_influence(run) == found
    lines = (tmp_path / "influence.csv").read_text().splitlines()
    assert lines[0] == "seed,left_out,item,held_out,loss,influence"
    assert len(lines) == 1 + 2 * ROWS * (ROWS + TWINS)
    content = json.loads(run.influence_file.read_text())
    run.influence_file.write_text(json.dumps({**content, "seeds": [1, 2, 3]}))
    with pytest.raises(InputError, match=r"influence\.json: not an influence that this kit wrote"):
        load_influence(run)
