"""Write the figures of `bench.scale` into the placeholders of docs/scale.md.

The placeholders are `<!--name-->figure<!--/-->` in the text, and `<!-- figures -->` and
`<!-- /figures -->` around the tables, so that another run replaces only these.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import Any

from bench.rows import interval, ratio

PAGE = Path(__file__).parent.parent / "docs/scale.md"
#: PostgreSQL's default.
MAX_CONNECTIONS = 100
#: Connections that a worker may have to the key store: SQLAlchemy's pool of 5 and 10 more.
POOL = 15
#: Seconds between two writes of the uses of keys.
WRITES = 5
_PLACE = re.compile(r"(<!--(\w+)-->).*?(<!--/-->)")
_TABLES = re.compile(r"(<!-- figures -->\n).*(\n<!-- /figures -->)", re.DOTALL)


def fill(result: dict[str, Any], path: Path = PAGE) -> None:
    """Put what `scale` measured into the page."""
    path.write_text(filled(path.read_text(), figures(result), tables(result)))


def filled(text: str, found: dict[str, str], between: str) -> str:
    """Return `text` with these figures and tables. Raises KeyError for an unknown placeholder."""
    text = _PLACE.sub(lambda place: place[1] + found[place[2]] + place[3], text)
    return _TABLES.sub(lambda place: place[1] + between + place[2], text)


def places(text: str) -> set[str]:
    """Return the names of the placeholders in `text`."""
    return {name for _, name, _ in _PLACE.findall(text)}


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians of bare MLflow and of the gate over the rounds, and their ratios."""
    items = ("per_second", "p50_ms", "p99_ms", "cpu_us")
    return {
        **{
            name: {item: median(one[item] for one in ones) for item in items}
            for name, ones in found.items()
        },
        "ratio": ratio(found, "per_second"),
        "cpu_ratio": ratio(found, "cpu_us"),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    bare, gate = row["bare"], row["gate"]
    return (
        f"{bare['per_second']:6.0f}→{gate['per_second']:6.0f}  {interval(row['ratio']):19}"
        f"{bare['p50_ms']:6.1f}→{gate['p50_ms']:6.1f}{bare['p99_ms']:7.1f}→{gate['p99_ms']:6.1f}"
        f"{bare['cpu_us']:7.0f}→{gate['cpu_us']:6.0f}  {interval(row['cpu_ratio'])}"
    )


def tables(result: dict[str, Any]) -> str:
    """Return the measurements in Markdown."""
    lines = [f"- {name}: {value}" for name, value in result["machine"].items()]
    lines += [
        "",
        "| workers | request | req/s bare → gate | ratio | p50 ms | p99 ms | µs CPU | CPU ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in result["configurations"]:
        for row in one["rows"]:
            bare, gate = row["bare"], row["gate"]
            cells = [_name(one), row["row"], f"{bare['per_second']:.0f} → {gate['per_second']:.0f}"]
            cells += [interval(row["ratio"])]
            cells += [f"{bare[item]:.1f} → {gate[item]:.1f}" for item in ("p50_ms", "p99_ms")]
            cells += [f"{bare['cpu_us']:.0f} → {gate['cpu_us']:.0f}", interval(row["cpu_ratio"])]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| workers | memory per worker, MB PSS (RSS) bare → gate | key store connections per worker, "
        "idle (most) | idle statements/s per worker, in all | scrape, ms |",
        "|---|---|---|---|---|",
    ]
    for one in result["configurations"]:
        bare, gate = (
            f"{one[f'{n}_Pss_mb']:.0f} ({one[f'{n}_Rss_mb']:.0f})" for n in ("bare", "gate")
        )
        each = one["idle"]["statements"]
        lines.append(
            f"| {_name(one)} | {bare} → {gate} | {one['idle']['connections']:.1f} "
            f"({one['connections_most']:.1f}) | {each:.1f}, {each * _workers(one):.0f} | "
            f"{one['scrape_more_ms']:.0f} |"
        )
    return "\n".join(lines)


def figures(result: dict[str, Any]) -> dict[str, str]:
    """Return every figure that the page may show."""
    grown, ones = result["growth"], result["configurations"]
    last, idle, used = ones[-1], ones[-1]["idle"], ones[-1]["per_request"]
    revoked = last.get("revocation_ms", [0.0])

    def cpu(row_name: str, side: str = "gate") -> float:
        rows = [row for one in ones for row in one["rows"] if row["row"] == row_name]
        return float(median(row[side]["cpu_us"] for row in rows))

    return {
        **{name: _round(figure) for name, figure in grown.items()},
        **{f"idle_{name}": _round(figure) for name, figure in idle.items()},
        **{name: _round(figure) for name, figure in used.items()},
        "cached_mb": _round(grown["cached_key_bytes"] * 10_000 / 1e6),
        "window_entry_bytes": _round(grown["window_many_bytes"] / 100_000),
        "use_month_mb": _round(grown["use_bytes"] * 60 * 24 * 31 / 1e6),
        "store_mb": _round(grown["key_bytes"] * 100_000 / 1e6),
        "event_million_mb": _round(grown["event_bytes"]),
        "use_keys": _round(WRITES * 1000 / grown["use_write_ms"]),
        "unknown_per_core": _round(1e6 / cpu("unknown key: 401")),
        "redis_most": _round(1e6 / grown["redis_many_us"]),
        "workers_connections": str(MAX_CONNECTIONS // POOL),
        "workers_idle": _round(1000 / max(idle["postgresql_cpu_ms"], 0.01)),
        "worker_mb": _round(last["gate_Pss_mb"] - last["bare_Pss_mb"]),
        "request_us": _round(cpu("no limit")),
        "limited_us": _round(cpu("hourly limit") - cpu("no limit")),
        "bare_us": _round(cpu("no limit", "bare")),
        "per_core": _round(1e6 / cpu("no limit")),
        "connections_most": _round(max(one["connections_most"] for one in ones)),
        "scrape_first_ms": _round(ones[0]["scrape_more_ms"]),
        "scrape_last_ms": _round(ones[min(2, len(ones) - 1)]["scrape_more_ms"]),
        "scrape_many_ms": _round(last.get("scrape_many_ms", 0.0)),
        "revoked_ms": _round(median(revoked)),
        "revoked_most_ms": _round(max(revoked)),
    }


def _name(one: dict[str, Any]) -> str:
    return f"{one['replicas']} × {one['workers']}" if one["replicas"] > 1 else str(one["workers"])


def _workers(one: dict[str, Any]) -> int:
    return int(one["replicas"] * one["workers"])


def _round(figure: float) -> str:
    """Format with two significant digits, without a power of ten."""
    text = f"{float(f'{figure:.2g}'):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
