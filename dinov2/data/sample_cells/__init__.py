"""Draw blood cells for demonstrations and tests: without images of patients or downloads, and with known labels."""

from dinov2.data.sample_cells.drawing import DEFAULT_SIZE_PX, draw_cell
from dinov2.data.sample_cells.forms import CELL_CLASSES, Slide
from dinov2.data.sample_cells.sets import SUBTYPES, contact_sheet, write_sample_cells

__all__ = ["CELL_CLASSES", "DEFAULT_SIZE_PX", "SUBTYPES", "Slide", "contact_sheet", "draw_cell", "write_sample_cells"]
