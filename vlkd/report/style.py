"""The style sheet of a report: one column of sections, for bright and dark screens, laptops, phones and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --raised: #f6f7f9; --ink: #1d2127; --soft: #5d6470; --line: #dfe2e6; --grid: #e8eaed;
  --accent: #0072b2; --right: #0a8f5b; --near: #9a6700; --miss: #c0392b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --raised: #1c2027; --ink: #e7e9ec; --soft: #9ba3af; --line: #2e343d; --grid: #272c34;
    --accent: #5db4ea; --right: #3ecf8e; --near: #e3b341; --miss: #f47067;
    --series-0: #4aa8e0; --series-1: #f0803c; --series-2: #2fc79a; --series-3: #e09cc3; --series-4: #e0b93a;
    --series-5: #8fd0f5; --series-6: #a999d0; --series-7: #a3a3a3;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1080px; margin: 0 auto; padding: 48px 28px 80px; }
h1 { font-size: 32px; line-height: 1.15; letter-spacing: -.02em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 21px; letter-spacing: -.01em; margin: 0 0 16px; }
h3 { font-size: 16px; margin: 28px 0 4px; }
p { margin: 0 0 12px; max-width: 68ch; overflow-wrap: anywhere; }
.lead { color: var(--soft); font-size: 17px; margin: 10px 0 0; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 20px; font-size: 14px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { margin-top: 44px; padding-top: 28px; border-top: 1px solid var(--line); }
small { font-size: 12px; color: var(--soft); font-weight: 400; }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 28px 0 0; }
.figure { background: var(--raised); border-radius: 10px; padding: 14px 16px; }
.figure dt { font-size: 13px; color: var(--soft); line-height: 1.35; }
.figure dd {
  margin: 4px 0 0; font-size: 26px; font-weight: 650; letter-spacing: -.02em; line-height: 1.2;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
.figure small { display: block; letter-spacing: 0; margin-top: 3px; line-height: 1.35; }

.table { margin: 0 0 16px; }
.table > div { overflow-x: auto; }
.table figcaption { font-size: 13px; line-height: 1.5; margin-top: 10px; max-width: 80ch; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 15px; min-width: 60%; }
th, td { padding: 9px 18px 9px 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line); }
thead th {
  color: var(--soft); font-size: 13px; font-weight: 500; white-space: nowrap;
  border-bottom-color: var(--soft); vertical-align: bottom;
}
tbody th { font-weight: 500; min-width: 9em; }
th + th:not([scope=row]), td.number { text-align: right; }
thead th.words { text-align: left; }
td small { display: block; white-space: nowrap; line-height: 1.3; }
td.best { color: var(--right); font-weight: 700; }
tr.aside th, tr.aside td { color: var(--soft); }
td:last-child, th:last-child { padding-right: 0; }

.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 24px 36px;
  margin-bottom: 20px; }
svg.plot { display: block; width: 100%; max-width: 640px; height: auto; }
.plots > svg.plot:only-child { grid-column: 1 / -1; max-width: 720px; }

.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 470px), 1fr)); gap: 16px;
  margin: 14px 0 8px; }
.query { background: var(--raised); border-radius: 10px; padding: 14px 16px 16px; min-width: 0; break-inside: avoid; }
.query header { display: flex; justify-content: space-between; align-items: flex-start; gap: 12px; }
q { font-weight: 550; line-height: 1.4; overflow-wrap: anywhere; min-width: 0; }
.chip {
  flex: none; font-size: 12px; line-height: 1; padding: 5px 9px; border-radius: 99px; white-space: nowrap;
  border: 1px solid currentColor; font-variant-numeric: tabular-nums;
}
.hit { color: var(--right); } .near { color: var(--near); } .miss { color: var(--miss); }
ol.tiles, ol.captions { list-style: none; margin: 12px 0 0; padding: 0; }
.tiles { display: grid; grid-template-columns: repeat(var(--tiles), minmax(0, 1fr)); gap: 8px; }
.tiles li { font-size: 12px; line-height: 1.3; color: var(--soft); min-width: 0; }
.tiles img {
  display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px; background: var(--paper);
  outline: 1px solid var(--line); outline-offset: -1px;
}
.tiles .right img { outline: 3px solid var(--right); outline-offset: 0; }
.tiles .missed img { outline-style: dashed; }
.tiles .right b, .captions .right b { color: var(--right); }
.place { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 4px; margin-top: 6px;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.label { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.query.image { display: grid; grid-template-columns: 132px minmax(0, 1fr); gap: 16px; align-items: start; }
.query figure { margin: 0; }
.query figure img { display: block; width: 100%; border-radius: 6px; outline: 1px solid var(--line);
  outline-offset: -1px; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; margin-top: 10px; }
.pair img { aspect-ratio: 4 / 3; object-fit: contain; background: var(--paper); }
figcaption { font-size: 12px; color: var(--soft); overflow-wrap: anywhere; margin-top: 4px; }
ol.captions { display: grid; grid-template-columns: max-content minmax(0, 1fr) auto; column-gap: 10px; }
.captions li {
  display: grid; grid-column: 1 / -1; grid-template-columns: subgrid; font-size: 14px; line-height: 1.4;
  padding: 4px 0; border-top: 1px solid var(--line);
}
.captions li:first-child { border-top: 0; }
.captions b { font-weight: 500; color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
.captions .caption { overflow-wrap: anywhere; }
.captions .right .caption { font-weight: 600; }
.captions .missed { border-top: 1px dashed var(--right); }
.captions .score { color: var(--soft); font-variant-numeric: tabular-nums; }

details summary { cursor: pointer; color: var(--accent); font-size: 15px; }
details .table { margin-top: 14px; }
details table { font-size: 14px; }
details th, details td { padding-top: 5px; padding-bottom: 5px; overflow-wrap: anywhere; }
details.names tbody th { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }

@media (max-width: 600px) {
  main { padding: 28px 16px 56px; }
  h1 { font-size: 26px; }
  section { margin-top: 32px; padding-top: 22px; }
  .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .figure dd { font-size: 22px; }
  .tiles { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .query.image { grid-template-columns: 96px minmax(0, 1fr); gap: 12px; }
  th, td { padding-right: 14px; }
}
@media print {
  main { max-width: none; padding: 0; } nav { display: none; } section, svg.plot, tr { break-inside: avoid; }
}
"""
