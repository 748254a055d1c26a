import numpy as np
import pytest
from example_sparse import expert_rows
from test_plots import assert_whole, curve, texts

from btm.evaluate.plots import ledger_bars
from btm.evaluate.plots_curves import dev_curves, loss_curves
from btm.evaluate.plots_experts import DomainShares, LayerSeries, domain_expert_maps, expert_curves
from btm.evaluate.report_experts import expert_series
from btm.records import Ledger


def test_every_quantity_has_a_panel_with_its_unit_and_a_line_per_layer() -> None:
    figure = expert_curves(expert_series(expert_rows([0, 3, 5], 8)))
    assert figure is not None
    written = texts(figure)
    titles = {"largest load", "entropy of the load", "dropped by full experts", "load-balancing loss"}
    units = {"largest / mean load", "share of log E (1 = even)", "% of assignments", "loss (1 = balanced)"}
    assert titles | units | {"block 0", "block 3", "block 5", "tokens read"} <= set(written)
    assert_whole(figure)


def test_shares_are_drawn_in_per_cent_at_their_tokens() -> None:
    figure = expert_curves({"dropped": [LayerSeries(2, [10, 20, 30], [0.5, 0.25, 0.0])]})
    assert figure is not None
    (line,) = figure.axes[0].lines
    assert line.get_xdata() == pytest.approx([10, 20, 30])
    assert line.get_ydata() == pytest.approx([50, 25, 0])


@pytest.mark.parametrize("num_layers", [12, 13, 40])
def test_many_layers_are_told_apart_by_name_or_by_depth(num_layers: int) -> None:
    figure = expert_curves(expert_series(expert_rows(list(range(num_layers)), 4)))
    assert figure is not None
    lines = figure.axes[0].lines
    assert len({str(line.get_color()) for line in lines}) == num_layers
    assert ("block, from the input upwards" in texts(figure)) is (num_layers > 12)
    assert_whole(figure)


def test_nothing_is_drawn_of_nothing() -> None:
    assert expert_curves({}) is None
    assert expert_curves({"load": [LayerSeries(0, [], [])], "unknown": [LayerSeries(0, [1], [1])]}) is None
    assert domain_expert_maps([], [], "expert") is None


def test_a_map_shows_domains_experts_and_shares_in_per_cent() -> None:
    layers = [
        DomainShares(0, ["law", "$x^$"], np.array([[0.7, 0.3, 0.0], [0.004, 0.996, 0.0]])),
        DomainShares(5, ["law", "$x^$"], np.array([[0.2, 0.2, 0.6], [0.0, 0.0, 0.0]])),
    ]
    figure = domain_expert_maps(layers, ["a", "b", "c"], "expert (of the domain)")
    assert figure is not None
    written = texts(figure)
    assert {"block 0", "block 5", "law", "$x^$", "a", "b", "c", "expert (of the domain)"} <= set(written)
    assert {"70", "30", "<1", "100", "60", "% of the domain's tokens"} <= set(written)
    meshes = [axes.collections[0] for axes in figure.axes[:2]]
    assert meshes[0].get_array().ravel().tolist() == pytest.approx([70, 30, 0, 0.4, 99.6, 0])
    # One scale: the same colour is the same share in every panel.
    assert [mesh.get_clim() for mesh in meshes] == [pytest.approx((0, 99.6))] * 2
    assert_whole(figure)


@pytest.mark.parametrize(("num_experts", "num_layers"), [(8, 6), (16, 6), (64, 6), (256, 2), (1, 1)])
def test_maps_of_many_experts_stay_whole(num_experts: int, num_layers: int) -> None:
    shares = np.full((12, num_experts), 1 / num_experts)
    domains = [f"domain-with-a-long-name-{index:02d}" for index in range(12)]
    figure = domain_expert_maps([DomainShares(b, domains, shares) for b in range(num_layers)], [], "expert")
    assert figure is not None
    assert figure.get_size_inches()[0] <= 10.4
    assert_whole(figure)


def test_curves_and_ledger_of_a_sparse_run_know_no_seed_phase() -> None:
    runs = [curve("sparse"), curve("dense")]
    losses, dev = loss_curves(runs), dev_curves({"law": runs})
    ledger = ledger_bars({"sparse": Ledger(tokens=10, flops=1e9, seconds=5)})
    assert losses is not None
    assert dev is not None
    assert ledger is not None
    for figure in (losses, dev, ledger):
        assert not any("seed" in text or "branch" in text or "ELM" in text for text in texts(figure))
        assert_whole(figure)
    assert {"sparse", "dense", "tokens read"} <= set(texts(losses)) & set(texts(dev))
