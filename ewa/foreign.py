"""Around calls of other libraries: complaints told apart from mistakes of our own, and no work for nothing."""
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple, Type

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class NotPossible(ValueError):
    """What another library complained of, in one line."""


@contextmanager
def foreign(message: str, *errors: Type[Exception]) -> Iterator[None]:
    """Around one call of another library: what it raises becomes a `NotPossible` of one line.

    timm calls our factories, and a model our layers. What one of these raises is either meant for the user already or a
    mistake of ours, and passes unchanged, unless it comes from timm in turn, which they hand the user's arguments to.

    Args:
        message: What can't be done, naming the value that the user gave; the complaint follows.
        *errors: What the call raises for wrong arguments or files. Default: any exception.

    Raises:
        NotPossible: The call raised one of `errors`.
    """
    try:
        yield
    except Exception as e:
        if errors and not isinstance(e, errors):
            raise
        # without the frames of this function and of the one with the `with` statement
        packages = [frame.f_globals.get('__name__', '').partition('.')[0] for frame, _ in walk_tb(e.__traceback__)][2:]
        if __package__ in packages:
            innermost = len(packages) - packages[::-1].index(__package__)
            if packages[innermost:innermost + 1] != ['timm']:
                raise
        raise NotPossible(f'{message}: {" ".join(str(e).split())[:400] or type(e).__name__}') from e


class Unfilled(TorchFunctionMode):
    """Around the making of a model that is given all its parameters next: they are not drawn at random first.

    Drawing the weights of a large model takes several times as long as reading them. Buffers are filled as ever.
    """
    _FILL = (Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_)

    def __torch_function__(
            self,
            func: Callable,
            types: Sequence[type],
            args: Tuple[Any, ...] = (),
            kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        """Leave a parameter as it is where it would be filled."""
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get('tensor')
        if isinstance(filled, nn.Parameter) and (
                func in self._FILL or getattr(func, '__module__', None) == nn.init.__name__):
            return filled
        return func(*args, **kwargs)
