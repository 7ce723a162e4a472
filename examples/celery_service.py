"""Celery's tasks as methods: work for processes on any number of machines, which outlives each of them.

Workers carry it out, and the server only waits; Redis is at 127.0.0.1:6379, or where REDIS_URL says::

    celery -A celery_service worker
    python -m gmprpc serve celery_service:service

``python -m gmprpc call 127.0.0.1:4423 fibonacci 30`` is then answered 832040.
"""

import os
from functools import wraps
from typing import Any

from celery import Celery, Task, uuid
from celery.result import AsyncResult

import gmprpc

url = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
app = Celery("celery_service", broker=url, backend=url)
app.conf.update(
    # A task whose process dies goes to another one, at once; one whose machine dies, when it hasn't been done within
    # the visibility time-out. Before that, a task that is still at work would have been ended: none runs twice at once.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    task_time_limit=60,
    broker_transport_options={"visibility_timeout": 180},
    # Redis may be away for a while: 0 tries for ever.
    result_backend_transport_options={"retry_policy": {"max_retries": None}},
    result_expires=600,
)
service = gmprpc.Service()


def method(task: Task) -> Task:
    """Register ``task`` as a method; the decorator of a Celery task."""

    @wraps(task.run)
    def send(*params: Any) -> gmprpc.Reply:
        task_id = uuid()
        try:
            result = task.apply_async(params, task_id=task_id)
        except gmprpc.CallCancelled:  # It may have been sent by now.
            app.control.revoke(task_id, terminate=True)
            raise
        reply = gmprpc.Reply()

        def answer(result: AsyncResult) -> None:  # Called by the one greenlet of Celery's that waits for all results.
            if reply.answered():
                pass
            elif result.successful():
                reply.set(result.result)
            else:
                reply.set_exception(result.result)

        def give_up() -> None:
            result.revoke(terminate=True)
            if not reply.answered():
                reply.error("cancelled")

        reply.on_cancel(give_up)
        result.then(answer)
        return reply

    service.register(send)
    return task


@method
@app.task
def fibonacci(n: int) -> int:
    """The n-th Fibonacci number, the slow way."""
    return n if n < 2 else fibonacci.run(n - 1) + fibonacci.run(n - 2)
