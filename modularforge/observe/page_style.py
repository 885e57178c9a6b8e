"""The style sheet of the page: one column, system fonts, numbers aligned, printable."""

CSS = """
:root { color-scheme: light; --ink: #1b1b1f; --grey: #5b5f66; --line: #e3e5e8; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 32px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 22px; margin: 48px 0 12px; padding-top: 12px; border-top: 2px solid var(--ink); }
h3 { font-size: 16px; margin: 0 0 6px; }
.headline { font-size: 18px; margin: 0 0 16px; }
.origin, .bar-text { color: var(--grey); font-size: 14px; overflow-wrap: anywhere; }
.problem { background: #fdf0e6; border-left: 4px solid #d55e00; padding: 8px 12px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 8px 0; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
dl { display: flex; flex-wrap: wrap; gap: 8px 40px; margin: 0 0 16px; }
dt { color: var(--grey); font-size: 14px; }
dd { margin: 0; font-size: 26px; font-variant-numeric: tabular-nums; }
.unit dd { font-size: 16px; line-height: 39px; color: var(--grey); }
figure { margin: 0 0 32px; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin: 0 0 24px; }
table { border-collapse: collapse; font-size: 14px; }
th { text-align: left; vertical-align: bottom; color: var(--grey); font-weight: 500; max-width: 9em; }
th { border-bottom: 1px solid var(--ink); overflow-wrap: break-word; }
th, td { padding: 4px 16px 4px 0; }
td { border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
details td { white-space: normal; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding: 4px 0 4px 12px; }
th.n { white-space: normal; }
.bar { height: 12px; background: var(--line); border-radius: 6px; overflow: hidden; }
.bar div { height: 100%; background: var(--accent); }
.bar-text { margin: 4px 0 16px; }
.sample { margin: 0 0 8px; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); margin: 8px 0; }
@media print { nav { display: none; } figure { break-inside: avoid; } }
"""
