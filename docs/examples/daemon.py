"""A miniature daemon: what a real one does with its store, on a small scale.

    python docs/examples/daemon.py [STORAGE-URL]

Without a URL it uses the store that `kaged status` shows. Kill it at any moment and start it again: it closes what was
left open and goes on with what is there. How commands are caged is not the point here, only what is kept about them.
"""

import os
import subprocess
import sys
import tempfile

import kagedb
from kagedb import AuditEvent, KagedError, NotFound, Project, Prompt, Run, Session

OPERATOR = "operator:ana"
DAEMON = "daemon:miniature"

CONFIG = """\
agent planner
  may dispatch scout, watcher, mender
  may run uname, ls, sleep, kaged-lint
"""
ALLOWED = ["uname", "ls", "sleep", "kaged-lint"]

WORK = [
    ("scout", ["uname", "-s"]),
    ("scout", ["ls", "/no/such/place"]),  # ends with an exit status that is not 0
    ("watcher", ["sleep", "0.5"]),
    ("mender", ["kaged-lint", "house"]),  # is allowed, but not installed
    ("mender", ["wget", "https://example.org/"]),  # is not allowed
]

CAGE = {"PATH": os.defpath}  # all that a command sees of the daemon's environment


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else None
    with kagedb.connect(url, exclusive=True) as storage:
        storage.subscribe(lambda change: print(f"  {change.kind} {change.subject}", flush=True))
        close_what_was_left_open()
        project = prepare_project()
        prompt = prepare_prompt(storage, project)
        session = enter_session(project)
        work(session, prompt)
        session.end(actor=OPERATOR)
        report(project, prompt, session)


def close_what_was_left_open() -> None:
    """A predecessor that was killed could not say how its runs ended."""
    for run in Run.left_open():
        print(f"left open by a predecessor: {run.agent} {run.input}")
        run.interrupt("the daemon ended under it")


def prepare_project() -> Project:
    try:
        project = Project.named("house")
    except NotFound:
        project = Project.add("house", actor=OPERATOR)
    # The same config again makes no new version.
    project.configure(CONFIG, parsed={"agent": "planner", "may_run": ALLOWED}, actor=OPERATOR, message="at the start")
    return project


def prepare_prompt(storage: kagedb.Storage, project: Project) -> kagedb.PromptVersion:
    """The prompt in production; the first time it is written, put to use, shortened, and put to use again."""
    try:
        return Prompt.resolve(project, "planner", "production")
    except NotFound:
        pass
    with storage.transaction():
        draft = Prompt.edit(project, "planner", "You look after a house.\nYou are careful.\n", actor=OPERATOR)
        label = Prompt.label(project, "planner", "production", draft, actor=OPERATOR)
        shorter = Prompt.edit(project, "planner", "You look after a house.\n", actor=OPERATOR, message="shorter")
        # Only if nobody has moved the label meanwhile.
        Prompt.label(project, "planner", "production", shorter, actor=OPERATOR, if_revision=label.revision)
    return shorter


def enter_session(project: Project) -> Session:
    """The session that is still going on, or a new one; somebody looks away and comes back."""
    session = Session.select().where((Session.project == project) & (Session.state != "ended")).first()
    if session is None:
        session = Session.start(project, title="night watch", actor=OPERATOR)
    else:
        print(f"the session {session.title!r} goes on")
    session.detach()
    session.attach()
    return session


def work(session: Session, prompt: kagedb.PromptVersion) -> None:
    """The planner's run, with a subagent's run below it for each command."""
    planner = Run.dispatch(session, agent="planner", input={"task": prompt.body}, prompt_version=prompt)
    runs = [run_command(session, planner, agent, command) for agent, command in WORK]
    good = sum(run.exit_status == 0 for run in runs)
    planner.finish(exit_status=0 if good == len(runs) else 1, output={"good": good, "of": len(runs)})


def run_command(session: Session, parent: Run, agent: str, command: list[str]) -> Run:
    run = Run.dispatch(session, agent=agent, input={"command": command}, parent=parent)
    allowed = command[0] in ALLOWED
    AuditEvent.record(
        "policy.decision", actor="agent:planner", subject=run, body={"command": command, "allowed": allowed}
    )
    if not allowed:
        run.cancel(f"the config does not allow {command[0]}")
        return run
    with tempfile.TemporaryDirectory() as cage:
        AuditEvent.record("sandbox.entered", actor=DAEMON, subject=run, body={"directory": cage})
        try:
            done = subprocess.run(command, cwd=cage, env=CAGE, capture_output=True, text=True, errors="replace")
        except FileNotFoundError:
            run.fail(f"{command[0]} is not installed", exit_status=127)
        else:
            run.finish(exit_status=done.returncode, output={"stdout": done.stdout, "stderr": done.stderr})
    return run


def report(project: Project, prompt: kagedb.PromptVersion, session: Session) -> None:
    sessions, events = project.sessions.count(), AuditEvent.select().count()
    print(f"{project.name}: {sessions} sessions, prompt version {prompt.version}, {events} audit events")
    for run in Run.of(session):
        indent = "  " if run.parent_id is None else "    "
        print(f"{indent}{run.agent}: {run.input} -> {run.state} {run.exit_status}, {run.error or run.output}")


if __name__ == "__main__":
    try:
        main()
    except KagedError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        sys.exit(error.exit_status)
