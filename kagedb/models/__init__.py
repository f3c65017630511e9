"""What the daemon stores: one file for each thing, the table and the verbs on it."""

from .audit import AuditEvent, AuditSeal
from .base import Counter, Model
from .blob import Blob, RunAttachment
from .checkpoint import Checkpoint, CheckpointHead
from .plugin import Plugin, PluginState
from .project import Project, ProjectConfig
from .prompt import Prompt, PromptLabel, PromptLabelMove, PromptVersion
from .run import Run, RunNode
from .session import Session
from .transcript import Transcript
from .transcript_chunk import TranscriptChunk

__all__ = [
    "AuditEvent",
    "AuditSeal",
    "Blob",
    "Checkpoint",
    "CheckpointHead",
    "Counter",
    "Model",
    "Plugin",
    "PluginState",
    "Project",
    "ProjectConfig",
    "Prompt",
    "PromptLabel",
    "PromptLabelMove",
    "PromptVersion",
    "Run",
    "RunAttachment",
    "RunNode",
    "Session",
    "Transcript",
    "TranscriptChunk",
]
