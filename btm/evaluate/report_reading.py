"""A document of the posterior trace as text, each token on the colour of the model that weighs most there."""

from btm.evaluate import report_html as web
from btm.evaluate.plots_style import colours
from btm.records import PosteriorTrace

_MOST_TOKENS = 400
_LIGHTEST, _DARKEST = 0.08, 0.62


def reading(trace: PosteriorTrace, member: str = "ELM") -> str:
    """Markup of the document; the stronger the colour, the larger the weight. Pointing at a token shows the weight."""
    colour = colours(trace.elms)
    key = "".join(f'<span style="background:{_tint(colour[elm], 1.0)}">{web.escape(elm)}</span>' for elm in trace.elms)
    spans = []
    for token, weights in list(zip(trace.tokens, trace.weights, strict=False))[:_MOST_TOKENS]:
        top = max(range(len(weights)), key=lambda index: weights[index], default=None)
        if top is None or top >= len(trace.elms):
            continue
        elm, weight = trace.elms[top], weights[top]
        tint = _tint(colour[elm], weight)
        spans.append(f'<span style="background:{tint}" title="{web.escape(elm)} {weight:.2f}">{_text(token)}</span>')
    shown = f"The first {_MOST_TOKENS} tokens" if len(trace.tokens) > _MOST_TOKENS else "The document"
    caption = (
        f"{shown}; background: the {member} that weighs most in predicting the token, stronger for larger weights."
    )
    body = f'<p class="key">{key}</p><p class="reading">{"".join(spans)}</p>'
    return web.details("Read the document", web.paragraph(caption, soft=True), body)


def _text(token: str) -> str:
    return "\n".join(web.escape(line) for line in token.replace("\r\n", "\n").expandtabs(4).split("\n"))


def _tint(colour: str, weight: float) -> str:
    strength = _LIGHTEST + (_DARKEST - _LIGHTEST) * min(1.0, max(0.0, weight))
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return f"rgba({red},{green},{blue},{strength:.2f})"
