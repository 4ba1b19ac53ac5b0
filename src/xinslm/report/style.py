"""CSS of the page: system fonts, tabular numbers, light and dark color schemes.

The series colors are Okabe and Ito's, which color-blind readers can tell apart.
"""

NUM_COLORS = 6
"""Number of series colors: the variables --c0 and following."""

CSS = """
:root { --paper: #fff; --ink: #1c2024; --soft: #60646c; --rule: #e3e5e8; --panel: #f6f7f8; --warn: #a34400;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b5568f; --c4: #8a6d00; --c5: #3b3b98; }
@media (prefers-color-scheme: dark) { :root { --paper: #121416; --ink: #e6e8eb; --soft: #9ba1a8; --rule:
  #2c3034;
  --panel: #1a1d20; --warn: #ffb27a;
  --c0: #56b4e9; --c1: #f0894a; --c2: #3cc79a; --c3: #e08fc0; --c4: #e6c84b; --c5: #a3a3f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 28px 96px; }
header p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
header .kicker { font-size: 12px; letter-spacing: .09em; text-transform: uppercase; }
header .warning { color: var(--warn); margin-top: 8px; }
h1 { font-size: 34px; line-height: 1.2; letter-spacing: -.015em; margin: 4px 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.005em; margin: 0 0 16px; }
h3 { font-size: 14px; margin: 0 0 8px; }
section { margin-top: 52px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin-top:
  28px; }
.tiles div { background: var(--panel); border-radius: 8px; padding: 14px 18px; }
.tiles span { display: block; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.tiles b { display: block; font-size: 27px; font-weight: 600; line-height: 1.35; font-variant-numeric:
  tabular-nums; }
.tiles small { font-size: 14px; font-weight: 400; color: var(--soft); display: inline-block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 14px 8px 0; border-bottom: 1px solid var(--rule); white-space: nowrap;
  }
th { font-size: 13px; font-weight: 500; color: var(--soft); }
td:first-child { white-space: normal; min-width: 9em; overflow-wrap: anywhere; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; }
.note { color: var(--soft); font-size: 13px; margin: 10px 0 24px; max-width: 76ch; overflow-wrap: anywhere; }
.charts { display: grid; gap: 32px; margin-bottom: 28px; }
figure { margin: 0; }
figcaption { font-size: 14px; color: var(--soft); margin-bottom: 8px; }
figcaption strong { color: var(--ink); font-weight: 600; }
figcaption div { display: flex; flex-wrap: wrap; gap: 2px 22px; margin-top: 2px; }
.key b { font-weight: 600; color: var(--ink); font-variant-numeric: tabular-nums; }
.key::before { content: ""; display: inline-block; width: 18px; border-top: 1.5px solid var(--k);
  margin-right: 7px;
  vertical-align: 4px; }
.key.strong::before { border-top-width: 4px; border-radius: 2px; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.tick, .label { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
polyline { fill: none; stroke: var(--k); stroke-linejoin: round; }
polyline.fine { stroke-width: 1.1; opacity: .75; } polyline.strong { stroke-width: 2.2; }
circle, rect { fill: var(--k); }
.chance { stroke: var(--ink); stroke-dasharray: 2 3; }
.reference { stroke: var(--soft); stroke-dasharray: 6 4; }
details article { background: var(--panel); border-radius: 8px; padding: 16px 18px; margin-bottom: 14px; }
.c0 { --k: var(--c0); } .c1 { --k: var(--c1); } .c2 { --k: var(--c2); }
.c3 { --k: var(--c3); } .c4 { --k: var(--c4); } .c5 { --k: var(--c5); }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 20px;
  margin-bottom: 20px; }
.samples article { background: var(--panel); border-radius: 8px; padding: 16px 18px 4px; }
blockquote { margin: 0; font-family: Charter, "Bitstream Charter", Cambria, Georgia, serif; white-space:
  pre-wrap;
  overflow-wrap: anywhere; }
blockquote span { color: var(--soft); }
pre { background: var(--panel); border-radius: 8px; padding: 14px 18px; margin: 0 0 16px; overflow-x: auto;
  font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--soft); margin-bottom: 12px; }
@media print { main { padding: 0; } section { break-inside: avoid; } }
"""
