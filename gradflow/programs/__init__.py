"""What a compiled program takes for constant, as a hash: so that neither it nor a store answers for another one."""

from gradflow.programs._captured import captured as captured
from gradflow.programs._captured import fresh_jit as fresh_jit
from gradflow.programs._captured import numbers as numbers
from gradflow.programs._code import DIALECT as DIALECT
from gradflow.programs._code import code_of as code_of
