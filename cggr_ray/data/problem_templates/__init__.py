"""The templates of `cggr_ray.data.problems`, one file a domain."""

from cggr_ray.data.problem_templates.counting import COUNTING
from cggr_ray.data.problem_templates.integers import INTEGERS
from cggr_ray.data.problem_templates.money import MONEY
from cggr_ray.data.problem_templates.numbers import NUMBERS
from cggr_ray.data.problem_templates.space import SPACE
from cggr_ray.data.problem_templates.stock import STOCK
from cggr_ray.data.problem_templates.travel import TRAVEL
from cggr_ray.data.problem_templates.words import Draw, Template, render_answer
from cggr_ray.data.problem_templates.work import WORK

TEMPLATES: tuple[Template, ...] = tuple(
    row for table in (MONEY, STOCK, TRAVEL, WORK, SPACE, NUMBERS, INTEGERS, COUNTING) for row in table.rows
)

__all__ = ["TEMPLATES", "Draw", "Template", "render_answer"]
