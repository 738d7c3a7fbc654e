"""What every folder uses: problems, progress, files, pictures, masks, sheets."""
