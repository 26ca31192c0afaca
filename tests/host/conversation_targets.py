"""The inner end of a conversation, as the tests want it."""

import json
import os
import sys
import time


def serve(emit):
    emit("ready")
    for line in sys.stdin:
        request = json.loads(line)
        number = request["number"]
        emit("text", text=f"doing {request['do']}")
        if request["do"] == "die":
            os._exit(3)
        if request["do"] == "hang":
            wait(None)
        if request["do"] == "wait":
            wait(emit)
        emit("answer", number=number - 1, stale=True)
        emit("answer", number=number, done=request["do"])


def wait(emit):
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            if emit is not None:
                emit("text", text="interrupted")
                return


def fail(emit):
    raise ValueError("no good")


def never_ready(emit):
    time.sleep(600)
