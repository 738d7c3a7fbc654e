"""Pictures in a grid, with headings and labels."""

from PIL import Image, ImageDraw, ImageFont


def contact_sheet(rows: list[list[Image.Image]], columns: list[str], labels: list[str]) -> Image.Image:
    """Pictures in a grid with a heading over each column and a label over each row. All of one size."""
    enlarged = max(1, 128 / rows[0][0].width)  # tiny ones are enlarged, so that the labels can be read, too
    tile, tall = (round(enlarged * side) for side in rows[0][0].size)
    line, gap = max(18, tile // 12), max(2, tile // 64)
    font = ImageFont.load_default(size=line * 0.7)
    width, height = len(columns) * (tile + gap) + gap, line + len(rows) * (line + tall + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str, colour: str, room: int) -> None:
        text = " ".join(text.split())[:room]  # one line, no wider than its column
        while font.getlength(text) > room:
            text = text[:-1]
        draw.text((x, y), text, colour, font)

    for i, heading in enumerate(columns):
        write(gap + i * (tile + gap), 1, heading, "black", tile)
    for j, (row, label) in enumerate(zip(rows, labels)):
        top = line + j * (line + tall + gap)
        write(gap, top, label, "dimgray", width - 2 * gap)
        for i, image in enumerate(row):
            big = image.resize((tile, tall), Image.Resampling.NEAREST if tile > image.width else None)
            sheet.paste(big, (gap + i * (tile + gap), top + line))
    return sheet
