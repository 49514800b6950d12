"""Figures are drawn from metrics that behave as a run's do: the artists' own data is compared with the csv."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mini_symposium import figures
from mini_symposium.errors import InputError

N = 5
TITLES = ["Why?", "It costs $x_{ and $y", "<img src=x onerror=alert(1)>", "你好\n😀", "A very long question " * 9]


def metrics(rates=(1e-4, 1e-5), epochs=6) -> dict[float, list[dict]]:
    """Loss falls with the dose, from 3 for the first example and a little more for each next; epochs are shuffled."""

    def line(rate, step):
        epoch, place = divmod(step - 1, N)
        example = int(np.random.default_rng(epoch).permutation(N)[place])
        loss = (3 + 0.1 * example) / (1 + (rate * step / 1e-3) ** 2)
        return {"step": step, "epoch": epoch, "example": example, "learning_rate": rate, "loss": loss, "seconds": 0.1}

    return {rate: [line(rate, step) for step in range(1, epochs * N + 1)] for rate in rates}


def bars():
    return [{"title": title, "prompt": 20 + i, "completion": 100 * i + 3} for i, title in enumerate(TITLES)]


def moved(rate=1e-5, **more):
    row = {"learning_rate": rate, "dose": rate * 400, "a_moved_share": 0.9987}
    return {**row, "a_travel_rms": rate, "b_travel_rms": rate * 90, "b_travel_max": rate * 300, **more}


def grid(formats=("alpaca", "### Role $x_{"), models=("base", "1e-05"), queries=("Why?", "How?")):
    cells = [(f, m, q) for m in models for q in queries for f in formats]
    return [{"format": f, "model": m, "query": q, "recall": i / 10, "answer": "x"} for i, (f, m, q) in enumerate(cells)]


def asked(rates=(1e-4, 1e-5), epochs=(0, 10, 30)):
    return [
        {"learning_rate": rate, "epoch": epoch, "rows": rows, "recall": epoch / 40 if rows == "training" else None}
        for rate in rates
        for epoch in epochs
        for rows in ("twins", "training")
    ]


DRAWINGS = {
    "loss_curves": lambda: figures.loss_curves(metrics(), N, "proxy"),
    "example_heatmap": lambda: figures.example_heatmap(metrics(), TITLES, "proxy"),
    "token_lengths": lambda: figures.token_lengths(bars(), "proxy", 512),
    "travel": lambda: figures.travel([moved(), moved(1e-4)], "proxy"),
    "format_grid": lambda: figures.format_grid(grid(), "recall", "proxy"),
    "recitation": lambda: figures.recitation(asked(), "proxy"),
}
every_drawing = pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)


def saved(picture, folder) -> pd.DataFrame:
    picture.save(folder / "picture")
    return pd.read_csv(folder / "picture.csv")


@every_drawing
def test_drawing_again_gives_the_same_bytes_whatever_the_users_style(draw, tmp_path):
    import matplotlib

    draw().save(tmp_path / "first")
    with matplotlib.rc_context({"font.size": 20, "text.color": "red", "axes.facecolor": "black"}):
        picture = draw()
        assert picture.save(tmp_path / "again") is picture
    assert picture._repr_png_()[0] == (tmp_path / "again.png").read_bytes()
    first, again = (
        [(tmp_path / f"{name}{end}").read_bytes() for end in (".csv", ".png")] for name in ("first", "again")
    )
    assert first == again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.csv", "again.png", "first.csv", "first.png"]


def test_recitation_is_drawn_by_rate_and_again_from_its_csv(tmp_path):
    picture = figures.recitation(asked(), "proxy").save(tmp_path / "first")
    (axes,) = picture.axes
    drawn = [line.get_ydata().tolist() for line in axes.lines if len(line.get_ydata()) > 1]
    assert drawn == [[0, 0.25, 0.75]] * 2
    looks = [(line.get_linestyle(), line.get_marker()) for line in axes.lines if len(line.get_ydata()) > 1]
    assert all(a != b for a, b in zip(*looks, strict=True))  # to be told apart in grey
    figures.recitation(pd.read_csv(tmp_path / "first.csv").to_dict("records"), "proxy").save(tmp_path / "again")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_a_grid_drawn_from_its_csv_gives_the_same_bytes(tmp_path):
    edges = [
        {"format": "alpaca", "model": f"m{m}", "query": f"q{q}", "passed": (m + 5 + 4 * q) / 256}
        for m in (0, 1)
        for q in range(4)
    ]
    figures.format_grid(edges, "passed", "tiny").save(tmp_path / "first")
    figures.format_grid(pd.read_csv(tmp_path / "first.csv").to_dict("records"), "passed", "tiny").save(
        tmp_path / "again"
    )
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()


@every_drawing
def test_the_scale_is_named_and_no_text_is_cut_off(draw):
    picture = draw()
    image = np.asarray(Image.open(io.BytesIO(picture.png())).convert("L"))
    assert any("proxy: SmolLM2-135M" in text.get_text() for text in picture.texts)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border == 255).all()


def test_the_curves_are_the_csv(tmp_path):
    picture = figures.loss_curves(metrics(), N, "proxy")
    csv = saved(picture, tmp_path)
    for axes, x in zip(picture.axes, ("epochs", "dose"), strict=True):
        dots, lines = axes.collections, [line for line in axes.lines if len(line.get_xdata()) > 1]
        for i, rate in enumerate([1e-4, 1e-5]):
            part = csv[csv["learning_rate"] == rate]
            np.testing.assert_allclose(dots[i].get_offsets(), part[[x, "loss"]], rtol=1e-5)
            np.testing.assert_allclose(lines[i].get_xydata(), part[[f"smoothed_{x}", "smoothed_loss"]], rtol=1e-5)


def test_smoothing_is_the_mean_of_one_epoch_at_its_middle():
    table = figures.loss_curves(metrics(), N, "proxy").drawn
    low = table[table["learning_rate"] == 1e-5].reset_index()
    assert low["smoothed_loss"].isna().sum() == N - 1
    assert low["smoothed_loss"][N - 1] == pytest.approx(low["loss"][:N].mean())
    assert low["smoothed_dose"][N - 1] == pytest.approx(3 * 1e-5)
    assert low["smoothed_epochs"][N - 1] == pytest.approx(3 / N)


def test_by_dose_the_low_rate_lies_on_the_high_one_and_by_epoch_it_does_not():
    picture = figures.loss_curves(metrics(epochs=30), N, "proxy")
    for axes, apart in zip(picture.axes, (True, False), strict=True):
        high, low = [line.get_xydata()[N:] for line in axes.lines if len(line.get_xdata()) > 1]
        at = np.linspace(max(high[0, 0], low[0, 0]), min(high[-1, 0], low[-1, 0]), 20)
        gaps = np.abs(np.interp(at, *high.T) - np.interp(at, *low.T))
        assert (gaps.max() > 0.5) == apart


def test_the_heat_map_is_the_csv_and_its_first_row_is_learned_first(tmp_path):
    picture = figures.example_heatmap(metrics(), TITLES, "proxy")
    csv = saved(picture, tmp_path)
    over_run = [sum(line["loss"] for line in metrics()[1e-4] if line["example"] == i) for i in range(N)]
    order = sorted(range(N), key=over_run.__getitem__)
    assert order != list(range(N))
    names = [label.get_text() for label in picture.axes[0].get_yticklabels()]
    assert [name[:4] for name in names] == [TITLES[i][:4].replace("\n", " ") for i in order]
    scales = set()
    for axes, rate in zip(picture.axes, [1e-4, 1e-5], strict=False):
        mesh = axes.collections[0]
        cells = csv[csv["learning_rate"] == rate].pivot(index="example", columns="epoch", values="loss")
        np.testing.assert_allclose(mesh.get_array(), cells.loc[order], rtol=1e-5)
        scales.add(mesh.get_clim())
    assert len(scales) == 1


def test_the_bars_are_the_csv(tmp_path):
    picture = figures.token_lengths(bars(), "paper", 512)
    csv = saved(picture, tmp_path)
    prompts, completions = picture.axes[0].containers
    assert [bar.get_width() for bar in prompts] == list(csv["prompt"])
    assert [bar.get_width() for bar in completions] == list(csv["completion"])
    assert [bar.get_x() for bar in completions] == list(csv["prompt"])
    assert list(csv["title"]) == TITLES


def test_travel_is_the_csv_and_one_that_stood_still_is_said_to(tmp_path):
    picture = figures.travel([moved(1e-5), moved(1e-4, a_travel_rms=0.0, a_moved_share=0.0)], "proxy")
    csv = saved(picture, tmp_path)
    axes = picture.axes[0]
    for rate in (1e-4, 1e-5):
        of_rate = csv[csv["learning_rate"] == rate]
        assert of_rate["steady"].to_numpy() == pytest.approx(rate * 400)
        assert of_rate["random_signs"].to_numpy() == pytest.approx(rate * 20)
    dots = sorted(line.get_xdata()[0] for line in axes.lines)
    assert dots[1:] == pytest.approx(sorted(csv["measured"])[1:], rel=1e-5)
    said = [text.get_text() for text in axes.texts]
    shapes = {line.get_marker() for line in axes.lines if line.get_color() == axes.lines[0].get_color()}
    assert len(shapes) == 1 and len({line.get_marker() for line in axes.lines}) == 2  # lora_B's mark, and lora_A's
    assert "did not move; 0.00% of its elements moved" in said
    assert "3e-3, 75% of rate × steps" in said


def test_the_grid_writes_the_numbers_of_the_csv(tmp_path):
    picture = figures.format_grid(grid(), "recall", "proxy")
    csv = saved(picture, tmp_path)
    assert list(csv.columns) == ["model", "query", "format", "recall"]
    for axes, model in zip(picture.axes, ("base", "1e-05"), strict=True):
        of_model = csv[csv["model"] == model]
        assert sorted(text.get_text() for text in axes.texts) == sorted(f"{x:.2f}" for x in of_model["recall"])
    assert picture.axes[0].texts[1].get_text() == "0.20"  # first row is "alpaca": "Why?", then "How?"


def test_with_more_queries_than_formats_each_query_is_a_named_row():
    (axes,) = figures.format_grid(grid(models=["1e-05"], queries=("Why?", "How?", "Who?")), "recall", "proxy").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Why?", "How?", "Who?"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["alpaca", "### Role $x_{"]
    assert [text.get_text() for text in axes.texts] == ["0.00", "0.10", "0.20", "0.30", "0.40", "0.50"]
    assert axes.get_title("left") == "LR 1e-5"


def test_a_grid_with_holes_leaves_them_empty():
    texts = [text.get_text() for text in figures.format_grid(grid()[1:], "recall", "proxy").axes[0].texts]
    assert sorted(texts) == ["", "0.10", "0.20", "0.30"]


@pytest.mark.parametrize("steps", [1, 3, N, 2 * N])
def test_a_run_that_has_only_begun_is_drawn(steps):
    begun = {rate: lines[:steps] for rate, lines in metrics().items()}
    for picture in (figures.loss_curves(begun, N, "tiny"), figures.example_heatmap(begun, TITLES, "tiny")):
        assert picture.png().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: figures.loss_curves({}, N, "proxy"), "no step has been logged"),
        (lambda: figures.loss_curves({1e-5: []}, N, "proxy"), "no step has been logged"),
        (lambda: figures.example_heatmap({}, TITLES, "proxy"), "no step has been logged"),
        (lambda: figures.example_heatmap(metrics(), TITLES[:2], "proxy"), "name example 4, the dataset has 2"),
        (lambda: figures.format_grid([], "recall", "proxy"), "nothing to draw"),
        (lambda: figures.format_grid(grid(), "rouge", "proxy"), "without 'rouge'"),
    ],
)
def test_nothing_to_draw_is_said(call, what):
    with pytest.raises(InputError, match=what):
        call()
