"""The style sheet of the report.

Text has at least 11 pixels at every width. Content that is wider than a phone scrolls in its panel.
"""

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  color: #222; background: #f6f6f6; max-width: 1240px; margin: 0 auto; padding: 1em 20px 3em }
h1 { font-size: 1.55em; margin: .4em 0 .6em; overflow-wrap: anywhere }
h2 { font-size: 1.25em; margin: 1.6em 0 .6em; border-bottom: 1px solid #ccc }
h3 { font-size: 1.05em; margin: 1.3em 0 .4em }
h4 { font-size: .95em; margin: 0 0 .3em; overflow-wrap: anywhere }
p { margin: .5em 0; max-width: 62em }
.wide { overflow-x: auto; margin: .6em 0 }
table { border-collapse: collapse; font-size: .9em; background: #fff }
th, td { padding: .35em .7em; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: baseline; white-space: nowrap }
th { background: #ececec; white-space: normal; vertical-align: bottom }
.number { text-align: right; font-variant-numeric: tabular-nums }
td b { font-weight: 700 }
.panels, .cards { display: grid; gap: 12px; align-items: stretch;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 366px), 1fr)) }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)) }
.halves { grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)) }
figure, .card { margin: 0; padding: 10px; background: #fff; border: 1px solid #ddd;
  border-radius: 4px; min-width: 0 }
.card h3 { margin: 0 0 .3em }
figcaption { color: #444; font-size: .85em; margin-top: .4em; overflow-wrap: anywhere }
figure > svg { width: 100%; height: auto; display: block }
svg text { paint-order: stroke; stroke: #fff; stroke-width: 3px; stroke-linejoin: round }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: .2em 1.2em; margin: .4em 0;
  padding: 0; font-size: .9em; overflow-wrap: anywhere }
.classes .key { display: block; columns: 2 }
.classes li { break-inside: avoid; margin-bottom: .25em }
.sample { vertical-align: -1px; overflow: visible }
.sample g { stroke: none }
dl { display: grid; gap: .25em 1.5em; margin: .3em 0; font-size: .93em;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)) }
dl div { display: flex; gap: .8em }
dl div:has(code) { grid-column: 1 / -1 }
dt { color: #555; flex: 0 0 5em }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; flex: 1 }
code { font: 12.5px/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }
dd code { display: block; background: #f3f3f3; padding: .3em .5em; border-radius: 3px;
  white-space: pre-wrap }
dd code span { display: inline-block; max-width: 100%; overflow-wrap: anywhere }
.absent { color: #663c00; background: #fff3d6; padding: .4em .8em; border-radius: 4px;
  margin: .4em 0; overflow-wrap: anywhere; grid-column: 1 / -1; max-width: none }
summary { cursor: pointer; margin: .6em 0 }
.views th { font-weight: normal; font-size: 12px; line-height: 1.3; background: none;
  vertical-align: top; border-bottom: 0; border-left: 1px solid #ccc; padding: 2px 6px }
.views td { padding: 2px 3px; border: 0 }
.views th b { font-size: 13px }
.views img { width: 104px; height: 104px; object-fit: contain; display: block }
img.small { image-rendering: pixelated }
.halves figure:only-child .views img { width: 150px; height: 150px }
.rows { display: grid; gap: 0 30px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 530px), 1fr)) }
.row { display: flex; gap: 8px; padding: 6px 0; border-top: 1px solid #e4e4e4 }
.query, .hit { width: 77px; flex: none; font-size: 12px; line-height: 1.25;
  overflow-wrap: anywhere }
.query img, .hit img { width: 73px; height: 73px; object-fit: cover; display: block;
  border: 3px solid #888; margin-bottom: 2px }
.nearest { display: flex; flex-wrap: wrap; gap: 4px; min-width: 0 }
.hit.right img { border: 4px solid #0072b2 }
.hit.wrong img { border: 4px dashed #d55e00 }
.hit b { font-size: 13px }
@media (max-width: 600px) {
  body { padding: .5em 10px 2em }
  figure, .card { padding: 7px }
  .halves figure:only-child .views img { width: 104px; height: 104px }
  dl div { display: block; margin-bottom: .2em }
}
@media print {
  @page { margin: 12mm }
  body { background: #fff; padding: 0; max-width: none; font-size: 13px }
  figure, .card, tr, .row, .key, section > p { break-inside: avoid }
  h2, h3, h4, section > p { break-after: avoid }
  .query, .hit { width: 70px; font-size: 11px }
  .query img, .hit img { width: 60px; height: 60px }
  .panels { grid-template-columns: repeat(2, minmax(0, 1fr)) }
  .cards, .halves { grid-template-columns: minmax(0, 1fr) }
  .wide { overflow: visible }
  th, td { white-space: normal; padding: .25em .4em }
  .views img, .halves figure:only-child .views img { width: 56px; height: 56px }
  .views th { padding: 2px }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact }
}
"""
