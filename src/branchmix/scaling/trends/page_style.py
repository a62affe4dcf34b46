"""Style sheets of the page of trends, beside those that all pages have."""

from __future__ import annotations

from collections.abc import Sequence

STYLE = """
svg text { font-family: system-ui, sans-serif }
.chart text { paint-order: stroke; stroke: var(--back); stroke-width: 3px; stroke-linejoin: round }
.chart svg, .card svg, .shape svg, .badge svg { display: block; min-width: 0; height: auto; color: var(--ink) }
.chart { margin: 0 }
.chart svg { width: 100%; max-width: 36rem }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 3px }
a { color: var(--accent) }

.bar { position: sticky; top: 0; z-index: 3; background: var(--back); border-bottom: 1px solid var(--line);
  margin: 1.5rem 0 0; padding: .45rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1.6rem }
.bar fieldset { border: 0; margin: 0; padding: 0; min-width: 0; display: flex; flex-wrap: wrap; gap: .1rem .9rem }
.bar legend { float: left; padding: 0; margin-right: .8rem; color: var(--soft) }
.bar label { cursor: pointer; white-space: nowrap }
.bar input { margin: 0 .35rem 0 0; accent-color: var(--accent) }
.view { display: none }

#glance { scroll-margin-top: 4.6rem }
#glance h2 { border-top: 0; margin-top: .8rem; padding-top: .4rem }
#glance h3 { margin: .6rem 0 0 }
#glance h3 + .note { margin: 0 }
.groups { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .4rem .8rem }
.group { grid-column: span var(--span); display: flex; flex-direction: column }
.group .cards { margin-top: auto }
.tally { list-style: none; margin: .5rem 0 1rem; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.6rem }
.cards { display: grid; grid-template-columns: repeat(var(--span), minmax(0, 1fr)); gap: .8rem; padding: .5rem 0 .8rem }
.card { display: flex; flex-direction: column; border: 1px solid var(--line); border-radius: 8px; padding: .6rem .7rem;
  color: inherit; text-decoration: none }
.card:hover { border-color: var(--accent) }
.card b { overflow-wrap: anywhere; line-height: 1.3; margin-bottom: auto }
.card > svg { width: 100%; margin: .35rem 0 .2rem }
.badge { display: flex; align-items: center; gap: .5rem; font-size: .92rem; font-weight: 600; line-height: 1.25;
  min-height: 2.4rem }
.badge svg { width: 2.5rem; flex: none }
.badge small { font-weight: 400; display: block; font-size: .82rem }
.badge i { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; border: 2px solid;
  margin-right: .35rem }
.weak { font-weight: 400; color: var(--soft) }

.shapes { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: .9rem 1.6rem;
  margin: .8rem 0 }
.shape { display: flex; align-items: flex-start; gap: .8rem }
.shape svg { width: 5.2rem; flex: none; margin-top: .2rem }
.shape p { margin: 0; font-size: .92rem }

.task { border-top: 1px solid var(--line); padding: 1.1rem 0 .6rem; scroll-margin-top: 4.6rem }
.task h3 { font-size: 1.15rem; margin: 0 0 .3rem; overflow-wrap: anywhere }
.task > p { margin: .2rem 0 .8rem }
.task h4 { font-size: .9rem; font-weight: 600; margin: .9rem 0 .3rem }
.pair { display: grid; grid-template-columns: minmax(0, 36rem) minmax(15rem, 1fr); gap: .6rem 1.6rem;
  align-items: start }
.said p { margin: .25rem 0 .9rem; font-size: .92rem }
.beside p { margin: .5rem 0; font-size: .92rem }
.beside .hint { border-left: 3px solid #E69F00; padding: .1rem 0 .1rem .7rem }
.example { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15rem; overflow-y: auto; margin: .3rem 0 .5rem }
.right { color: #00795a; font-weight: 600 }
details { margin: .5rem 0 }
summary { cursor: pointer; color: var(--accent) }
.top { font-size: .875rem }

@media screen and (prefers-color-scheme: dark) {
  .right { color: #3fcf9f }
  svg [stroke="#0072B2"] { stroke: #5ab1f2 } svg [fill="#0072B2"] { fill: #5ab1f2 }
  svg [stroke="#009E73"] { stroke: #22c796 } svg [fill="#009E73"] { fill: #22c796 }
  svg [stroke="#D55E00"] { stroke: #ff8340 } svg [fill="#D55E00"] { fill: #ff8340 }
  svg [stroke="#777777"] { stroke: #a0a6ad } svg [fill="#777777"] { fill: #a0a6ad }
}
@media (max-width: 56rem) {
  .pair { grid-template-columns: minmax(0, 1fr) }
  .groups { display: block }
  .cards { grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)) }
}
@media (max-width: 30rem) {
  .bar { gap: .2rem 1rem; font-size: .9rem }
  .task, #glance { scroll-margin-top: 7rem }
  .tally { display: block }
  .tally .badge { min-height: 2rem }
  .cards { grid-template-columns: 1fr 1fr; gap: .5rem }
  .card { padding: .5rem }
  .card b, .badge { font-size: .85rem }
  .badge svg { width: 2rem }
}
@media print {
  :root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --back: #fff; --tint: #f6f8fa;
    --accent: #0969da }
  body { font-size: 11pt }
  main { max-width: none; padding: 0 }
  .bar { position: static }
  .groups { display: block }
  .pair, .card, .shape, .example { break-inside: avoid }
  h2, h3 { break-after: avoid }
  .example { max-height: none }
  .top { display: none }
  details::details-content { content-visibility: visible; block-size: auto }
}
@supports not selector(:has(a)) { .view { display: block } }
"""


def switch_rules(metrics: Sequence[str], axes: Sequence[str]) -> str:
    """Which views are to be seen, for each choice of a metric and an axis; both are the switches' ids."""
    return "\n".join(
        f"main:has(#{metric}:checked):has(#{axis}:checked) .{metric}.{axis} {{ display: block }}"
        for metric in metrics
        for axis in axes
    )
