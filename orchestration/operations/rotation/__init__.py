"""Rotate a password of an environment without downtime: `make rotate SECRET=...`.

Every rotation has the same steps, so that at each time both values are valid for those who still have the old one:

1. The new value is written into the Secret next to the old one, as KEY.next. No pod uses it yet.
2. What checks the value accepts the new one, too: Postgres, the Prefect API, Valkey.
3. The new value becomes that of KEY, and the old one that of KEY.previous.
4. The pods that read the Secret restart, and the command waits until no pod has the old value.
5. The old value ends, and KEY.previous is deleted. Of `roles` it is .KEY.previous until no pod accepts the old value.

The Secret alone records the progress. So an interrupted command is completed by the same command.
"""
