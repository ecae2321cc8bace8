"""The page: what matters first, everything else behind a click.  Text of runs is escaped, nothing is fetched or run."""

from collections.abc import Sequence
from html import escape

from umer1.report.chart import line_chart, number
from umer1.report.runs import Run, is_finite

# In the order in which a person looks at them; a field that is not named here comes under "Everything else".
SECTIONS = {
    "Training": {
        "loss": "loss",
        "disc_loss": "InfoNCE, disc",
        "gen_loss": "InfoNCE, gen",
        "ce_query": "language loss of queries",
        "ce_positive": "language loss of positives",
        "disc_recall": "recall in the batch, disc",
        "gen_recall": "recall in the batch, gen",
        "grad_norm": "gradient norm",
        "learning_rate": "learning rate",
    },
    "Reinforcement": {
        "reward": "reward",
        "ranking": "ranking score",
        "margin": "margin",
        "reward_std": "spread of rewards within a prompt",
        "zero_spread_share": "prompts whose rewards are all equal",
        "kl": "KL to the reference",
        "entropy": "entropy, nats",
        "clip_share": "ratios that were clipped",
        "response_length": "response, tokens",
        "cut_off_share": "responses cut off",
        "missing_gen_emb_share": "responses without <gen_emb>",
        "mismatch_mean": "log-probs, |trainer - engine|",
    },
    "Speed and memory": {
        "milliseconds": "a step, ms",
        "tokens_per_second": "tokens/s",
        "patches_per_second": "patches/s",
        "generated_tokens_per_second": "tokens generated/s",
        "seconds_rollout": "rollout, s",
        "seconds_update": "update, s",
        "waiting_share": "share of the step that waits for data",
        "mfu": "MFU",
        "memory_mib": "memory at the peak, MiB",
        "padding_share": "padding",
        "load_imbalance": "modelled cost, the heaviest rank's by the mean",
    },
}
_HIDDEN = {"train_iters", "consumed_samples", "global_batch_size", "eta_seconds", "temperature"}
_COLOURS = 8
_STYLE = """
:root{color-scheme:light dark;--page:#f9f9f7;--card:#fff;--ink:#111;--soft:#565550;--line:#dddcd6;
--c0:#2a78d6;--c1:#c2410c;--c2:#0f766e;--c3:#7c3aed;--c4:#a16207;--c5:#be185d;--c6:#4d7c0f;--c7:#475569}
@media(prefers-color-scheme:dark){:root{--page:#111110;--card:#1b1b19;--ink:#f2f1ec;--soft:#a9a79f;--line:#383733;
--c0:#5b9df0;--c1:#fb923c;--c2:#2dd4bf;--c3:#a78bfa;--c4:#facc15;--c5:#f472b6;--c6:#a3e635;--c7:#94a3b8}}
*{box-sizing:border-box}body{margin:0;padding:1.2rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}main{max-width:1460px;margin:auto}h1{font-size:1.5rem;margin:.2rem 0}
h2{font-size:1.15rem;margin:1.8rem 0 .6rem}h3{font-size:.95rem;font-weight:600;margin:0 0 .3rem}
h1,h2,h3,p,li,summary{overflow-wrap:anywhere}td,th{overflow-wrap:break-word;max-width:28rem}
.soft{color:var(--soft);font-weight:400}
.warn{border-left:4px solid var(--c1);padding-left:.7rem}
.grid-of{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem .8rem;min-width:0}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.grid{stroke:var(--line);stroke-width:1}.line{fill:none;stroke:var(--k);stroke-width:1.8;stroke-linejoin:round}
.dot{fill:var(--k)}.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;background:var(--k);
margin-right:.4em}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;padding:0;list-style:none;position:sticky;top:0;
background:var(--page)}
.side-by-side{display:flex;flex-wrap:wrap;gap:.8rem 3rem;align-items:flex-start}
.wide{overflow-x:auto;max-width:100%}table{border-collapse:collapse;font-size:.88rem}
th,td{text-align:left;padding:.25rem .8rem .25rem 0;
border-bottom:1px solid var(--line);vertical-align:top}td.n{font-variant-numeric:tabular-nums}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem;margin:.4rem 0}summary{cursor:pointer}
""" + "".join(f".c{i}{{--k:var(--c{i})}}" for i in range(_COLOURS))


def page(runs: Sequence[Run], made_by: str) -> str:
    """The whole HTML document."""
    title = "umer1: " + ", ".join(run.name for run in runs)
    body = [
        f"<h1>{escape(title)}</h1><p class=soft>{escape(made_by)}</p>",
        _legend(runs),
        _warnings(runs),
        _summary(runs),
        *_charts(runs),
        _settings(runs),
        *(_environment(run) for run in runs),
        *(_samples(run) for run in runs),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _legend(runs: Sequence[Run]) -> str:
    items = "".join(
        f'<li><span class="key c{i % _COLOURS}"></span>{escape(run.name)}'
        + (f" <span class=soft>{escape(str(run.path))}</span></li>" if str(run.path) != run.name else "</li>")
        for i, run in enumerate(runs)
    )
    return f"<ul class=legend>{items}</ul>"


def _warnings(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        if run.damaged_lines:
            lines.append(f"{run.name}: {run.damaged_lines} damaged lines of metrics.jsonl are left out")
        for key, count in sorted(run.not_finite.items()):
            lines.append(f"{run.name}: {key} was not finite {count} times")
        lines += [f"{run.name}: {note}" for note in run.notes]
    return "".join(f"<p class=warn>{escape(line)}</p>" for line in lines)


def _summary(runs: Sequence[Run]) -> str:
    columns = {
        "iteration": "step",
        "train_iters": "of",
        "loss": "loss",
        "reward": "reward",
        "disc_recall": "recall, disc",
    }
    columns |= {"gen_recall": "recall, gen", "tokens_per_second": "tokens/s", "memory_mib": "MiB"}
    columns |= {"skipped_iterations": "skipped", "nan_iterations": "not finite", "bad_samples": "bad samples"}
    shown = [key for key in columns if any(isinstance(run.last.get(key), int | float) for run in runs)]
    rows = [
        [run.name, *(number(run.last[key]) if is_finite(run.last.get(key)) else "" for key in shown)] for run in runs
    ]
    return "<h2>At the last step</h2>" + _table(["run", *(columns[key] for key in shown)], rows)


def _charts(runs: Sequence[Run]) -> list[str]:
    named = {key for fields in SECTIONS.values() for key in fields} | _HIDDEN
    others = sorted({key for run in runs for key in run.curves} - named)
    found = []
    for section, fields in (SECTIONS | {"Everything else": {key: key for key in others}}).items():
        cards = []
        for key, text in fields.items():
            curves = [(i % _COLOURS, run.name, run.curves[key]) for i, run in enumerate(runs) if key in run.curves]
            if curves:
                cards.append(
                    f"<figure class=card style=margin:0><h3>{escape(text)}</h3>{line_chart(text, curves)}</figure>"
                )
        if not cards:
            continue
        grid = f"<div class=grid-of>{''.join(cards)}</div>"
        if section in SECTIONS:
            found.append(f"<h2>{escape(section)} <span class=soft>by step</span></h2>{grid}")
        else:
            found.append(f"<h2>{escape(section)}</h2><details><summary>{len(cards)} charts</summary>{grid}</details>")
    return found


def _settings(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [[key, *(run.settings.get(key, "(not there)") for run in runs)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    head = ["setting", *(run.name for run in runs)]
    parts = ["<h2>Settings</h2>"]
    if len(runs) > 1:
        parts.append(_table(head, differing) if differing else "<p>The same in all runs.</p>")
    parts.append(f"<details><summary>All {len(rows)} settings</summary>{_table(head, rows)}</details>")
    return "".join(parts)


def _environment(run: Run) -> str:
    if not run.versions and not run.pairs:
        return ""
    versions = _table(["from step", "package", "version"], [[str(step), *rest] for step, *rest in run.versions])
    pairs = _table(["data set", "pairs"], [[name, f"{count:,}"] for name, count in run.pairs.items()])
    both = f"<div class=side-by-side>{versions}{pairs}</div>"
    return f"<h2>Environment and data of {escape(run.name)}</h2>{both}"


def _samples(run: Run) -> str:
    parts = []
    for name, text in run.rollouts:
        parts.append(f"<details class=card><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>")
    if run.bad_causes:
        total = sum(run.bad_causes.values())
        causes = _table(["cause", "samples"], [[cause, f"{n:,}"] for cause, n in sorted(run.bad_causes.items())])
        keys = list(dict.fromkeys(key for record in run.bad_samples for key in record))
        first = _table(keys, [[str(record.get(key, "")) for key in keys] for record in run.bad_samples])
        parts.append(
            f"<details class=card><summary>{total:,} bad samples</summary>{causes}<p>The first:</p>{first}</details>"
        )
    return f"<h2>Samples of {escape(run.name)}</h2>{''.join(parts)}" if parts else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(word)}</th>" for word in head)
    lines = "".join("<tr>" + "".join(f"<td class=n>{escape(word)}</td>" for word in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{first}</tr>{lines}</table></div>"
