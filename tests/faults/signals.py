"""Ctrl-C, SIGTERM, and a terminal that is closed."""

import re
import signal

from tests.faults.lab import Lab, Row, steps_logged


def asked_to_stop(lab: Lab) -> Row:
    """At a random step; saved there, and the command that goes on is printed."""
    signals = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
    for number, status in signals.items():
        run = lab.fresh("stopped")
        process = lab.start(lab.training(run))
        target = lab.rng.randrange(2, 25)
        lab.until(lambda run=run, target=target: steps_logged(run) >= target, process)
        process.send_signal(number)
        done = lab.end(process)
        assert done.status == status and "Traceback" not in done.err, done
        assert re.search(r"stopped and saved; to go on: .* -m sngpt_jax\.train", done.err)
        lab.goes_on_to_the_same(run)
    (message,) = [line for line in done.err.splitlines() if "stopped and saved" in line]
    return Row(
        "Ctrl-C (SIGINT), SIGTERM, SIGHUP (the terminal is closed) at a random step",
        "The training finishes the step, saves, and prints the command that resumes.",
        message.partition(" -m ")[0] + " -m sngpt_jax.train …",
        "130, 143, 129",
        len(signals),
    )


def interrupted_while_starting(lab: Lab) -> Row:
    """Before there is anything to save."""
    tried = 5 if lab.thorough else 2
    for _ in range(tried):
        run, moment = lab.fresh("hardly_begun"), lab.after(lab.rng.uniform(0.3, 0.5 * lab.seconds))
        process = lab.start(lab.training(run))
        lab.until(
            lambda run=run, moment=moment: moment() or (run / "config.json").exists(), process
        )
        process.send_signal(signal.SIGINT)
        done = lab.end(process)
        assert done.status == 130 and "Traceback" not in done.err, done
    return Row(
        "Ctrl-C while the command starts", "The command ends at once.", "interrupted", "130", tried
    )
