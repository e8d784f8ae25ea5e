"""The teacher's directory + the student's -> a model to distil from, in the student's order."""

from pathlib import Path
from typing import Any

from cast_serve.errors import UsageError
from cast_train.checkpoint import channel_order
from cast_train.checkpoint.channel_order import ChannelOrder
from cast_train.checkpoint.models import check_dense, check_same_tokens, load_any
from cast_train.config import TrainConfig
from cast_train.precision import arithmetic
from cast_train.pruning.reorder import reorder_residual


def load_teacher(
    teacher_dir: Path | None,
    model_dir: Path,
    student: Any,
    config: TrainConfig,
) -> Any:
    """Loads the teacher, frozen, in the dtype that `precision` computes in.

    Args:
        teacher_dir: dense HF directory; None: model_dir.
        model_dir: the student's.
        student: transformers' config of the student.
        config: all settings.

    Raises:
        UsageError: if its tokens differ from the student's, or, where hidden states are compared,
            its shape or channel order.
    """
    directory = teacher_dir or model_dir
    if teacher_dir is not None:
        check_same_tokens(teacher_dir, model_dir)
    check_dense(directory)
    dtype = arithmetic(config.precision)
    teacher = load_any(directory, dtype, is_sharded=config.is_sharded).requires_grad_(False)
    if teacher.config.vocab_size != student.vocab_size:
        raise UsageError(
            f"the teacher {directory} has a vocabulary of {teacher.config.vocab_size} tokens and "
            f"the model one of {student.vocab_size}; give a teacher with the model's own tokenizer"
        )
    if not config.hidden_states_weight:
        return teacher.eval()
    for name in ("num_hidden_layers", "hidden_size"):
        found, wanted = getattr(teacher.config, name), getattr(student, name)
        if found != wanted:
            raise UsageError(
                f"the teacher {directory} has {name} {found} and the model {wanted}; set "
                "hidden_states_weight to 0 for a teacher of another shape"
            )
    if channel_order.read(directory) not in (None, channel_order.read(model_dir)):
        raise UsageError(
            f"the channel order of the teacher {directory} differs from that of {model_dir}, so "
            "hidden states cannot be compared; give the dense model that both were made from, or "
            "set hidden_states_weight to 0"
        )
    return teacher.eval()


def reorder_teacher(teacher: Any, directory: Path, order: ChannelOrder) -> None:
    """Reorders the teacher's hidden states as the student's are, so that they can be compared.

    Args:
        teacher: as `load_teacher` returns it.
        directory: where it was loaded from; if that was reordered before, it has the order already.
        order: of the student's channels.

    Raises:
        UsageError: if the teacher's architecture cannot be reordered.
    """
    if channel_order.read(directory) is not None:
        return
    try:
        reorder_residual(teacher, order)
    except UsageError as error:
        raise UsageError(
            f"the teacher cannot be reordered as the model was: {error}; set channel_order to "
            "given, or hidden_states_weight to 0"
        ) from error
