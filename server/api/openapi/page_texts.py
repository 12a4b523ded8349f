"""What ``docs/api.md`` says besides what can be read from the routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

HEAD: Final = """# The HTTP interface

Written by `python -P -m manylora.server.api.openapi.page`; a running server gives the same as OpenAPI 3.1 at
`/openapi.json`. Every answer that the tests see is held against it.

Clients written for OpenAI, vLLM and SGLang work unchanged:

```python
client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="...")
client.chat.completions.create(model="smollm2:ada", messages=[{{"role": "user", "content": "Hi"}}])
```

## What holds everywhere

**Nothing is accepted and ignored.** A field that is not in the tables below is a 400 that names it, and so is a value
that cannot be honoured. `null` is as good as leaving a field out, whatever the field. Types are strict: `"1"` and `1.0`
are no integers, `1` is not `true`.

**Bodies** are JSON with `Content-Type: application/json` (or another `+json`), not compressed, of at most
`--max-body` bytes.

**Which weights answer**: `model` is the base's name, an adapter's, or `base:adapter`; the whole name is tried before it
is split at its colon. `adapters` adds up several with scales, `lora_path` is SGLang's way to name one. The answer's
`model` is the name as it was asked for, and `system_fingerprint` has the digests of the base and of each adapter's
version, so that two answers can be told to be from the same weights.

**Keys** are sent as `Authorization: Bearer KEY`. Which are needed:

| | no key configured | `--api-key`, `--keys` | `--admin-key` | both |
| --- | --- | --- | --- | --- |
| `/health`, `/ready` | open | open | open | open |
| `/metrics` | open | open | open; with `--protect-metrics` the admin key | the same |
| managing adapters | loopback only | `--api-key`: loopback with the key; `--keys`: off | admin key | admin key |
| everything else | open | a key | open | either key |

A tenant's key may be for some adapters only: others are then a 403, as are those that do not exist, and `/v1/models`
does not list them.

**Request ids**: `X-Request-Id` of 1 to 128 visible ASCII characters is taken over, anything else replaced; every answer
has it, and the server's log.

**Streams** (`stream: true`) are server-sent events: `data: {{json}}`, an empty line, and so on; the last is
`data: [DONE]`. The status is sent with the first output, so a request that fails before has an honest one. One that
fails later ends with `data: {{"error": ...}}` and no `[DONE]`. With `stream_options.include_usage` one more event,
whose `choices` are empty, has the usage. A client that leaves aborts its request.

**Errors** are JSON of one shape, [ErrorResponse](#errorresponse):

```json
{{"error": {{"message": "The model `x` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}}}}
```

| Status | Meaning | Headers |
| --- | --- | --- |
{statuses}

Any path can also be answered 404 (there is no such path), 405 (with `Allow`), 408 or 431 (the request's head came too
slowly, or is too large), and 400 for what is not HTTP; the connection is then closed where it cannot go on.
"""

TAG_TEXTS: Final[Mapping[str, str]] = {
    "adapters": "Names may hold slashes. Replacing and unloading act at once for new requests; running ones finish on "
    "the version they began with. Paths must lie inside `--adapter-root`.",
    "adapters: vLLM and SGLang": "Statuses and texts are theirs. vLLM's answer with text, or with an error as "
    "everywhere else (its type for a name that is taken is `InvalidUserInput`); SGLang's with "
    "[SglangResult](#sglangresult), 400 if `success` is false.",
}
