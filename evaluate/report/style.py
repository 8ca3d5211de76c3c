"""The stylesheet of report.html: one column on a phone, plain black on white in print."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
  max-width: 1240px; padding: 16px; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .3em 0; }
h2 { font-size: 1.2rem; margin: 2em 0 .4em; border-bottom: 2px solid #222; }
h3 { font-size: 1rem; margin: 1.2em 0 .3em; }
p { max-width: 75ch; margin: .5em 0; }
.small, caption { color: #555; font-size: .85rem; }
.interval { color: #555; font-size: .95em; }
caption { text-align: left; caption-side: bottom; padding-top: 4px; }
.interval { white-space: nowrap; display: block; }
.cards { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
.card { border: 1px solid #ccc; border-top: 6px solid #666; padding: 6px 16px 10px;
  break-inside: avoid; }
.card h3 { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: center; margin: .4em 0; }
.card h3 b { margin-left: auto; font-size: .8rem; text-transform: uppercase;
  letter-spacing: .04em; border: 1.5px solid; padding: 0 7px; }
.card h4 { margin: 0; font-size: .8rem; color: #555; text-transform: uppercase;
  letter-spacing: .04em; }
.card p { font-size: .88rem; margin-bottom: 0; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.sides ul { list-style: none; padding: 0; margin: 4px 0; font-size: .88rem; }
.sides li { margin-bottom: 6px; }
.sides strong { font-size: 1.15rem; display: block; line-height: 1.2; white-space: nowrap; }
.not-worth-it { border-top-color: #D55E00; } .not-worth-it h3 b { color: #A84800; }
.worth-it { border-top-color: #009E73; } .worth-it h3 b { color: #00694D; }
.a-trade { border-top-color: #0072B2; } .a-trade h3 b { color: #005A8C; }
.pairs { padding-left: 1.1em; font-size: .92rem; } .pairs li { margin-bottom: 4px; }
.note { border: 2px solid #D55E00; padding: 6px 12px; margin: 10px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { overflow-wrap: normal; padding: 4px 9px; text-align: right; vertical-align: top;
  border-bottom: 1px solid #ddd; }
th { min-width: 4.6em; vertical-align: bottom; border-bottom: 2px solid #222; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff;
  min-width: 12.5em; white-space: nowrap; }
td, td data { white-space: nowrap; }
tr.dense td { background: #f2f2f2; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr));
  gap: 14px; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: .85rem; color: #555; }
svg { width: 100%; height: auto; display: block; font-family: system-ui, sans-serif; }
svg.key { width: 14px; height: 14px; display: inline-block; vertical-align: -2px; }
svg.wide { max-width: 760px; }
svg.map { max-width: 430px; }
.grid { stroke: #ddd; stroke-width: 1; }
.front { fill: none; stroke: #666; stroke-width: 1.2; stroke-dasharray: 5 4; }
.tick { font-size: 11px; fill: #444; }
.axis { font-size: 12px; fill: #222; }
.label { font-size: 11px; fill: #222; stroke: #fff; stroke-width: 3px; paint-order: stroke; }
.name { font-size: 12px; fill: #222; }
.cell { font-size: 10px; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 18px;
  font-size: .88rem; }
pre { background: #f5f5f5; padding: 10px; overflow-x: auto; font-size: .82rem;
  white-space: pre-wrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; font-size: .9rem; }
dt { color: #555; } dd { margin: 0; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr));
  gap: 18px; }
@media (max-width: 520px) { body { padding: 10px; font-size: 15px; }
  th:first-child, td:first-child { min-width: 9em; max-width: 9em; white-space: normal; }
  td:first-child data { white-space: normal; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } }
@media print { body { max-width: none; font-size: 10pt; padding: 0; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: 2px 4px; }
  h2 { break-after: avoid; } tr, figure { break-inside: avoid; }
  th:first-child, td:first-child { position: static; min-width: 0; }
  th, td, td data, .interval, th:first-child, td:first-child { white-space: normal; }
  th { min-width: 0; } pre { font-size: 7pt; } }
"""
