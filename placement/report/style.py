"""The report's style sheet: light and dark, wide and narrow, screen and print."""

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1b2430;--soft:#667085;--rule:#e4e7ec;
--a:#2f6fed;--b:#e4572e;--c:#12a150;--d:#9b51e0;--e:#c98a00;--f:#667085}
@media(prefers-color-scheme:dark){:root{--bg:#11151b;--card:#1a2029;--ink:#e8ecf2;--soft:#98a2b3;
--rule:#2b3340;--a:#6c9dff;--b:#ff8a66;--c:#4cd08a;--d:#c394ff;--e:#f0bd4f;--f:#98a2b3}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:36px 20px 60px}
header{margin-bottom:22px}h1{font-size:34px;line-height:1.1;margin:2px 0 6px}
.over{color:var(--soft);letter-spacing:.04em;margin:0;font-size:13px}
.what{font-size:18px;margin:0 0 8px}
.verdict{display:inline-block;margin:0;padding:6px 12px;border-left:4px solid var(--a);
background:var(--card);border-radius:0 6px 6px 0}
.note{color:var(--soft);font-size:13px;margin:8px 0 0;max-width:80ch}
h2{font-size:17px;margin:0 0 10px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.tiles div,figure,section:not(.tiles):not(.cards){background:var(--card);
border:1px solid var(--rule);border-radius:10px;padding:16px}
.tiles h3{margin:0;font-size:13px;font-weight:500;color:var(--soft)}
.tiles p{margin:2px 0}.tiles b{font-size:24px;font-variant-numeric:tabular-nums}
small,figcaption{color:var(--soft);font-size:13px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));
gap:16px;margin:16px 0}
figure{margin:0}svg{width:100%;height:auto;display:block}
section:not(.tiles):not(.cards){margin-top:16px}
.grid{stroke:var(--rule)}.line{fill:none;stroke-width:2.2;stroke-linejoin:round}
.mark{stroke:var(--soft);stroke-dasharray:5 4}
text{fill:var(--ink);font-size:12px}.tick{fill:var(--soft)}.label{fill:var(--soft)}
.group{font-weight:600}.value{font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin:6px 0}
.legend i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px}
th{color:var(--soft);font-weight:500}
th,td{text-align:right;padding:6px 10px;border-bottom:1px solid var(--rule);
font-variant-numeric:tabular-nums;white-space:nowrap}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}
pre{margin:0;overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace}
@media(max-width:560px){figure{overflow-x:auto}svg{min-width:480px}}
@media print{body{background:#fff}figure{break-inside:avoid}}
"""
