"""Code of the processes between xinslm and a generated program.

Every program pays for what is imported here, so these modules use few and cheap standard ones, no
dataclasses, and nothing of xinslm; their imports are relative because the folder above them is on
the path. With the usual imports the supervisor would take four times as long to start.
"""
