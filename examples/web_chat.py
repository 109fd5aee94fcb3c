"""A model behind a web address: answers are streamed as they come, and end when the browser goes away.

    pip install fastapi uvicorn
    MODEL=model.gguf uvicorn --app-dir examples web_chat:app
    curl -N localhost:8000/chat --json '{"messages": [{"role": "user", "content": "Hi"}]}'
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from qrun.engine import Model


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One model for all requests: they are computed together, and share what their conversations begin with."""
    app.state.model = await asyncio.to_thread(Model.load, os.environ["MODEL"])
    yield
    app.state.model.close()


app = FastAPI(lifespan=lifespan)


@app.post("/chat")
async def chat(messages: list[dict[str, Any]] = Body(embed=True), max_tokens: int = 200) -> StreamingResponse:  # noqa: B008
    try:
        generation = app.state.model.chat(messages, max_tokens=max_tokens)
    except (ValueError, TypeError) as error:  # nothing to answer, too long, or not as the template wants it
        raise HTTPException(422, str(error)) from error

    async def answer() -> AsyncIterator[str]:
        async for piece in generation:
            if piece.channel == "content":
                yield piece

    return StreamingResponse(answer(), media_type="text/plain; charset=utf-8")
