"""The rival of the durable store: an in-memory list behind HTTP and JSON, as in the paper's public code's server.

FastAPI, one process, POST /push appends to a list, POST /pop does list.pop(0). It keeps nothing: a kill loses all.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

app = FastAPI()
tasks: list[Any] = []


@app.post("/push")
async def push(request: Request) -> dict[str, int]:
    tasks.append(await request.json())
    return {"size": len(tasks)}


@app.post("/pop")
async def pop() -> dict[str, Any]:
    return {"task": tasks.pop(0) if tasks else None}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
