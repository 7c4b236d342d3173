"""The documentation page: the OpenAPI document as plain HTML, made here, with no script and nothing from elsewhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from serving.errors import PROBLEMS

EXAMPLE_PATH = "x-example-path"
"""In an operation: its path with values that are there."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2563c9; }
@media (prefers-color-scheme: dark) { :root { --accent: #8ab4f8; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1.5rem; }
h1 { margin-bottom: .25rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .5rem 0; padding: .5rem 1rem; }
summary { cursor: pointer; overflow-wrap: anywhere; } summary code { font-weight: 600; }
.method { display: inline-block; min-width: 4.5rem; font: 600 .8rem ui-monospace, monospace; color: var(--accent); }
pre { background: var(--soft); padding: .75rem; border-radius: .4rem; overflow: auto; font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
a { color: var(--accent); }
"""

_METHODS = ("get", "post", "put", "patch", "delete")


def page(document: dict[str, Any], base: str) -> str:
    """The whole page. base: the server's address, for the lines to paste."""
    sections: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method in _METHODS:
            if method in methods:
                tag = (methods[method].get("tags") or ["other"])[0]
                sections.setdefault(tag, []).append(_operation(path, method, methods[method], base))
    body = "".join(f"<h2>{escape(tag)}</h2>{''.join(parts)}" for tag, parts in sections.items())
    schemas = document.get("components", {}).get("schemas", {})
    shapes = "".join(_schema(name, schema) for name, schema in sorted(schemas.items()))
    problems = "".join(
        f'<tr id="problem-{name}"><td>{status}</td><td>{name}</td><td>{escape(title)}</td></tr>'
        for status, (name, title) in PROBLEMS.items()
    )
    title = escape(document["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="stylesheet" href="/docs.css"></head><body><main><h1>{title}</h1>'
        f"<p>{escape(document['info'].get('description', ''))}</p>"
        f'<p>Version {escape(document["info"]["version"])} &middot; <a href="/openapi.json">openapi.json</a></p>'
        f"{body}<h2>Problems</h2><p>Errors are <code>application/problem+json</code> (RFC 9457).</p>"
        f"<table><tr><th>Status</th><th>Type</th><th>Title</th></tr>{problems}</table>"
        f"<h2>Schemas</h2>{shapes}</main></body></html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any], base: str) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(p['name'])}</code></td><td>{escape(p['in'])}</td>"
        f"<td>{escape(p.get('description', p['schema'].get('description', '')))} {_limits(p['schema'])}</td></tr>"
        for p in operation.get("parameters", [])
    )
    parameters = f"<table><tr><th>Parameter</th><th>In</th><th></th></tr>{rows}</table>" if rows else ""
    answers = "".join(
        f"<tr><td>{escape(status)}</td><td>{escape(answer.get('description', ''))}</td><td>{_link(answer)}</td></tr>"
        for status, answer in operation["responses"].items()
    )
    return (
        f'<details><summary><span class="method">{method.upper()}</span> <code>{escape(path)}</code> '
        f"{escape(operation.get('summary', ''))}</summary><p>{escape(operation.get('description', ''))}</p>"
        f"{parameters}{_example(path, method, operation, base)}"
        f"<table><tr><th>Status</th><th></th><th>Schema</th></tr>{answers}</table></details>"
    )


def _example(path: str, method: str, operation: dict[str, Any], base: str) -> str:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    path = operation.get(EXAMPLE_PATH, path)
    if "example" not in content:
        return f"<pre>curl -s {'' if method == 'get' else f'-X {method.upper()} '}{escape(base + path)}</pre>"
    data = escape(json.dumps(content["example"]), quote=False)
    return f"<pre>curl -s {escape(base + path)} -H 'content-type: application/json' -d '{data}'</pre>"


def _link(answer: dict[str, Any]) -> str:
    for content in answer.get("content", {}).values():
        name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
        if name:
            return f'<a href="#schema-{name}">{name}</a>'
    return ""


def _limits(schema: dict[str, Any]) -> str:
    known = {"minimum": "at least", "maximum": "at most", "maxLength": "longest", "default": "default"}
    said = [f"{words} {schema[key]}" for key, words in known.items() if key in schema and schema[key] != ""]
    return f"({escape(', '.join(said))})" if said else ""


def _schema(name: str, schema: dict[str, Any]) -> str:
    text = escape(json.dumps(schema, indent=2), quote=False)
    description = escape(schema.get("description", ""))
    return (
        f'<details id="schema-{name}"><summary><code>{name}</code> {description}</summary><pre>{text}</pre></details>'
    )
