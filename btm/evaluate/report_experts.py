"""Section of a report on the expert layers of a sparse model; empty for a forest of dense models."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from btm.config_ffn import FfnConfig, FfnLayer
from btm.evaluate import report_html as web
from btm.evaluate.plots_experts import (
    QUANTITIES,
    SHARES,
    DomainShares,
    LayerSeries,
    domain_expert_maps,
    expert_curves,
)
from btm.evaluate.report_data import ReportData, Run
from btm.metrics import Row, number
from btm.tables import format_count

_TRAINING_KEY = re.compile(r"experts/(\d+)/(\w+)")
_DEV_KEY = re.compile(r"eval/(.+)/experts/(\d+)")
_CLASS_KEY = re.compile(r"classes/(.+)/experts/(\d+)")
_MOST_MAPS = 6
_CLASSES_CAPTION = (
    "Share of each class's dev tokens (rows, all domains together) that each expert (columns) reads at the end of "
    "training, in % of the class. A word starts after white space; word_inside is the rest of one."
)
_WEIGHTS = {"load_balance": "load_balance_weight", "z": "z_weight", "auxiliary": "auxiliary_weight"}
_LAYERS = {
    FfnLayer.top_k: "a learned router sends each token to its best experts",
    FfnLayer.demix: "each token goes to the expert of its domain",
    FfnLayer.base: "tokens are shared out evenly in training, and go to their best expert afterwards",
    FfnLayer.modality: "each token goes to experts of its modality",
}


def expert_parts(data: ReportData) -> list[str]:
    """Markup of the section; nothing for a run without expert layers."""
    parts = [part for run in data.runs if _is_sparse(run) for part in _run_parts(run)]
    if not parts and data.is_sparse:
        return [web.paragraph("No metrics of the sparse model were found, so nothing is known of its expert layers.")]
    return parts


def expert_series(rows: Sequence[Row]) -> dict[str, list[LayerSeries]]:
    """Every quantity that training logged of expert layers (``experts/<block>/<what>``), by ``<what>``, then block."""
    points: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        tokens = number(row, "tokens")
        for key in row if tokens is not None else ():
            found = _TRAINING_KEY.fullmatch(key)
            if found and tokens is not None and (value := number(row, key)) is not None:
                points.setdefault(found[2], {}).setdefault(int(found[1]), []).append((tokens, value))
    return {
        what: [LayerSeries(block, *map(list, zip(*layers[block], strict=True))) for block in sorted(layers)]
        for what, layers in points.items()
    }


def domain_shares(rows: Sequence[Row]) -> list[DomainShares]:
    """Where the dev tokens of each domain went, by the last row that counted them (``eval/<domain>/experts/<block>``).

    Domains whose counts are damaged are left out.
    """
    return _last_shares(rows, _DEV_KEY)


def class_shares(rows: Sequence[Row]) -> list[DomainShares]:
    """Where the dev tokens of each class went, by the last row that counted them (``classes/<class>/experts/<block>``).

    Classes are those of :mod:`btm.corpus.token_classes`.
    """
    return _last_shares(rows, _CLASS_KEY)


def _last_shares(rows: Sequence[Row], pattern: re.Pattern[str]) -> list[DomainShares]:
    for row in reversed(rows):
        counts: dict[int, dict[str, list[float]]] = {}
        for key, value in row.items():
            found = pattern.fullmatch(key)
            if found and _is_counts(value):
                counts.setdefault(int(found[2]), {})[found[1]] = value
        if counts:
            return [_shares(block, counts[block]) for block in sorted(counts)]
    return []


def specialisation(layer: DomainShares) -> float:
    """Mutual information of domain and expert in bits, all domains weighing the same.

    0 where all domains use the experts alike; the logarithm of the number of domains where no two share an expert.
    """
    used = layer.shares[layer.shares.sum(axis=1) > 0]
    if not len(used):
        return 0.0
    mean = used.mean(axis=0, keepdims=True)
    ratio = np.divide(used, mean, out=np.ones_like(used), where=used > 0)
    return max(0.0, float((used * np.log2(ratio)).sum() / len(used)))


def chosen(layers: Sequence[DomainShares], most: int = _MOST_MAPS) -> list[DomainShares]:
    """At most ``most`` layers, evenly over the depth, the first and the last among them."""
    places = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), most)).round().astype(int))
    return [layers[place] for place in places]


def _run_parts(run: Run) -> list[str]:
    series, maps = expert_series(run.rows), domain_shares(run.rows)
    ffn = run.spec.ffn if run.spec else None
    return [
        web.paragraph(_introduction(run, ffn, series)),
        web.heading("Load and losses over training"),
        web.figure(expert_curves(_without_zeros(series)), _curves_caption(ffn, series)),
        web.paragraph(_zeros_sentence(series), soft=True) if _zeros(series) else "",
        _table(series, maps),
        *_map_parts(run, ffn, maps),
    ]


def _introduction(run: Run, ffn: FfnConfig | None, series: dict[str, list[LayerSeries]]) -> str:
    blocks = sorted({one.block for found in series.values() for one in found})
    count = "1 block has an expert layer" if len(blocks) == 1 else f"{len(blocks)} blocks have expert layers"
    where = count if blocks else "The expert layers logged no metrics"
    listed = f" ({', '.join(map(str, blocks))}, counted from 0 at the input)" if 0 < len(blocks) <= 16 else ""
    what = f"; {_LAYERS[ffn.layer]} (ffn={ffn.layer})" if ffn and ffn.is_sparse else ""
    size = f" The model has {format_count(run.result.num_parameters)} parameters in all." if run.result else ""
    return f"{where}{listed}{what}.{size}"


def _curves_caption(ffn: FfnConfig | None, series: Mapping[str, object]) -> str:
    text = (
        "Each expert layer over training, by its transformer block. The load is that of one update: "
        "of its largest expert relative to the mean of all, and its entropy relative to an even load. "
    )
    weights = [f"{what} {getattr(ffn, key):g}" for what, key in _WEIGHTS.items() if what in series] if ffn else []
    losses = f"Losses are shown before their weights ({', '.join(weights)}). " if weights else ""
    return f"{text}{losses}Lines are moving averages over a twenty-fifth of the points."


def _table(series: dict[str, list[LayerSeries]], maps: Sequence[DomainShares]) -> str:
    by_block = {what: {one.block: one for one in found} for what, found in series.items() if what in QUANTITIES}
    told = {layer.block: specialisation(layer) for layer in maps if len(layer.domains) > 1}
    blocks = sorted({block for found in by_block.values() for block in found} | set(told))
    if not blocks:
        return ""
    shown = [what for what in QUANTITIES if what in by_block]
    headings = ["block", *(_heading(what) for what in shown)]
    headings += ["highest load at any time"] if "load" in shown else []
    headings += ["domain told by expert, bits"] if told else []
    rows = []
    for block in blocks:
        cells = [web.row_head(block)]
        cells += [web.number_cell(_value(what, by_block[what].get(block), -1)) for what in shown]
        if "load" in shown:
            load = by_block["load"].get(block)
            cells.append(web.number_cell(f"{max(load.values):.2f}" if load else "-"))
        if told:
            cells.append(web.number_cell(f"{told[block]:.2f}" if block in told else "-"))
        rows.append(cells)
    caption = "The last update that was logged"
    caption += (
        "; the last column is the mutual information of domain and expert on dev documents: 0 where all domains use "
        "the experts alike."
        if told
        else "."
    )
    return web.table(headings, rows, caption)


def _heading(what: str) -> str:
    title, unit = QUANTITIES[what]
    return f"{title}, {unit}"


def _value(what: str, one: LayerSeries | None, place: int) -> str:
    if one is None:
        return "-"
    value = one.values[place]
    return f"{100 * value:.1f}" if what in SHARES else f"{value:.3f}"


def _map_parts(run: Run, ffn: FfnConfig | None, maps: Sequence[DomainShares]) -> list[str]:
    if not maps:
        return [web.paragraph("No dev row counts the tokens of the experts by domain.", soft=True)]
    shown = chosen(maps)
    names, axis = _expert_names(run, ffn, maps[0].shares.shape[1])
    even = 100 / maps[0].shares.shape[1]
    some = f" {len(shown)} of {len(maps)} layers are shown, evenly over the depth." if len(shown) < len(maps) else ""
    caption = (
        "Share of each domain's dev tokens (rows) that each expert (columns) reads at the end of training, in % of the "
        f"domain; a token counts once for each expert that it takes. An even split is {even:.3g} %.{some}"
    )
    by_class = chosen(class_shares(run.rows))
    return [
        web.heading("Which expert reads which domain"),
        web.figure(domain_expert_maps(shown, names, axis), caption),
        *([web.heading("Which expert reads which kind of token")] if by_class else []),
        web.figure(domain_expert_maps(by_class, names, axis, rows_are="class"), _CLASSES_CAPTION) if by_class else "",
    ]


def _expert_names(run: Run, ffn: FfnConfig | None, count: int) -> tuple[list[str], str]:
    numbers = [str(place) for place in range(count)]
    if ffn is None or run.spec is None:
        return numbers, "expert"
    if ffn.layer is FfnLayer.demix and len(run.spec.sources) == count:
        return [source.domain for source in run.spec.sources], "expert (of the domain)"
    if ffn.layer is FfnLayer.modality and sum(ffn.group_sizes) == count:
        names = [f"{group}/{place}" for group, size in enumerate(ffn.group_sizes) for place in range(size)]
        return names, "expert (modality/number)"
    return numbers, "expert"


def _zeros(series: dict[str, list[LayerSeries]]) -> list[str]:
    return [what for what in SHARES if what in series and not any(any(one.values) for one in series[what])]


def _without_zeros(series: dict[str, list[LayerSeries]]) -> dict[str, list[LayerSeries]]:
    return {what: found for what, found in series.items() if what not in _zeros(series)}


def _zeros_sentence(series: dict[str, list[LayerSeries]]) -> str:
    words = {"dropped": "no assignment was dropped by a full expert", "unrouted": "no token was left without an expert"}
    text = " and ".join(words[what] for what in _zeros(series))
    return f"{text[:1].upper()}{text[1:]} in any update that was logged."


def _is_counts(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < float("inf") for n in value)
    )


def _shares(block: int, counts: dict[str, list[float]]) -> DomainShares:
    width = max(len(row) for row in counts.values())
    kept = {domain: row for domain, row in counts.items() if len(row) == width}
    values = np.array(list(kept.values()), dtype=float)
    return DomainShares(block, list(kept), values / np.maximum(1, values.sum(axis=1, keepdims=True)))


def _is_sparse(run: Run) -> bool:
    return any(_TRAINING_KEY.fullmatch(key) or _DEV_KEY.fullmatch(key) for row in run.rows for key in row)
