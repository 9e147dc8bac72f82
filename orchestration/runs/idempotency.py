"""A key by which what a task does elsewhere is done once, however often the task is executed."""

from uuid import NAMESPACE_URL, uuid5

from orchestration.errors import PipelineError


def idempotency_key() -> str:
    """A key of the task that calls this: the same in every execution of a flow run, with the same inputs.

    A run that is tried again executes what had begun and not finished once more. What takes such a key, like a payment
    or a table with a primary key, then does nothing a second time. Two calls of a task with the same inputs in one flow
    run have one key, as Prefect's default cache policy gives both the result of the first.

    Returns:
        A UUID's text.

    Raises:
        PipelineError: it is not a task that calls, or the task's inputs cannot be hashed.
    """
    from prefect.cache_policies import INPUTS
    from prefect.context import TaskRunContext

    context = TaskRunContext.get()
    if context is None:
        raise PipelineError("idempotency_key() is of the task that calls it. Call it inside of a task")
    name = f"{context.task.fn.__module__}.{context.task.fn.__qualname__}"
    try:
        inputs = INPUTS.compute_key(context, context.parameters, {})
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(
            f"task {context.task.name} has an input that cannot be hashed ({reason}). Make a key of your own"
        ) from None
    return str(uuid5(NAMESPACE_URL, f"{context.task_run.flow_run_id or context.task_run.id}/{name}/{inputs}"))
