"""The child process that runs one dbt command, and reports its progress as JSON lines.

`orchestration.dbt.process` starts this folder as a process: `[python, "-P", FOLDER]`. Python is 3.11 or later. dbt may
live in another environment than the flow, so this package imports no other part of this project, and its modules
import each other relatively.

Without arguments the process imports dbt at once, then waits for one command on stdin. With arguments it runs them
as dbt's command line does: `python -P FOLDER parse` leaves a partial parse that the process then accepts with any host
and user.

stdin: one line, then nothing until the end: `{"arguments": [...], "environment": {...}, "earlier": {...}, "started": t,
"only": [...], "target": name, "retries": n, "delay": s, "transient": regex, "sample_rows": n}`. `earlier` has the nodes
of earlier attempts by id: `{"asset": key, "done": whether to leave the node out, "batches": ranges or null}`. Nothing
runs if `target` is not null and dbt's target is another. stdin closes while dbt runs when the parent has died or
interrupts dbt. dbt then cancels its SQL.

stdout, a line for each event:

- `other target`: dbt's target, and the end
- `selected`: whether the command selected the whole project, and what it takes over from earlier attempts
- `nodes`: the nodes that the command selected, with their description
- `start`, `batches`, `retry`, `rows`, `end`: the progress of one node, by its unique id
- `log`: a line of dbt's log from level info on, with the node that the line is about
- `interrupted`: dbt is being interrupted, by a signal or because stdin has closed
- `result`: the end of the command

stderr: what dbt's macros print.
"""
