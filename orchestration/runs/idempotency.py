"""Idempotency keys of tasks: a retried run's side effects happen once in a system that knows the key."""

from uuid import NAMESPACE_URL, uuid5

from orchestration.errors import PipelineError


def idempotency_key() -> str:
    """Return the idempotency key of the calling task, which is the same in each attempt of the flow run.

    A retried run executes a task again that had begun and not finished. A system that takes the key, such as a payment
    service or a table with a primary key, then ignores the second request. Two calls of a task with the same inputs in
    one flow run have the same key: Prefect's default cache policy gives both the result of the first call.

    Returns:
        A UUID as text. It depends on the flow run, the task and the task's inputs.

    Raises:
        PipelineError: no task is the caller, or the task's inputs cannot be hashed.
    """
    from prefect.cache_policies import INPUTS
    from prefect.context import TaskRunContext

    context = TaskRunContext.get()
    if context is None:
        raise PipelineError("idempotency_key() has no task whose key it could return. Call it inside a task")
    name = f"{context.task.fn.__module__}.{context.task.fn.__qualname__}"
    try:
        inputs = INPUTS.compute_key(context, context.parameters, {})
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(
            f"Task {context.task.name} has an input that cannot be hashed: {reason}. Make your own key"
        ) from None
    return str(uuid5(NAMESPACE_URL, f"{context.task_run.flow_run_id or context.task_run.id}/{name}/{inputs}"))
