"""Several questions at once in one event loop, each with a time limit. Their tokens are computed in steps that they
share, which costs much less than one after the other, and the loop is free all the time.

    python examples/two_questions.py model.gguf "What is a llama?" "What is an alpaca?"
"""

import asyncio
import sys

from qrun.engine import Model, QrunError


async def ask(model: Model, question: str, seconds: float = 60.0) -> str:
    """The answer, or as much of it as has come in time."""
    generation = model.chat(question, max_tokens=200)
    try:
        async with asyncio.timeout(seconds):
            async for piece in generation:
                print(f"{len(generation.tokens):4} {question[:20]!r}: {piece!r}", file=sys.stderr)
    except TimeoutError:
        pass  # with the task that waited for it, the generation was cancelled
    return generation.text


async def main(path: str, *questions: str) -> None:
    model = await asyncio.to_thread(Model.load, path)  # loading and compiling are no work for an event loop
    with model:
        for question, answer in zip(questions, await asyncio.gather(*(ask(model, q) for q in questions)), strict=True):
            print(f"{question}\n  {answer}")


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except (QrunError, OSError) as error:
        sys.exit(str(error))
