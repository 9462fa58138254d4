"""The intake: a byte's way in, and out of the house again. One service for every door (plain uploads now, tus and links later)."""

from server.intake.fetched import fetch_file
from server.intake.housekeeping import Housekeeping
from server.intake.resumable import Resumable, ResumableUploads, Writer
from server.intake.scanner import Scanner
from server.intake.service import Intake
from server.intake.upload import Details, Upload

__all__ = ["Details", "Housekeeping", "Intake", "Resumable", "ResumableUploads", "Scanner", "Upload", "Writer", "fetch_file"]
