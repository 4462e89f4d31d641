"""Objects and their masks by a file of tools/export.py, with onnxruntime, numpy and Pillow alone.

    python docs/onnx_example.py model.onnx photo.jpg found.png
"""
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont, ImageOps

COLOURS = "#e6194b #3cb44b #4363d8 #ffe119 #f032e6 #42d4f4 #f58231 #911eb4 #bfef45 #469990".split()


def find(session: onnxruntime.InferenceSession, image: Image.Image) -> list[tuple]:
    """(class name, score, box xyxy, mask (height, width) bool) of each object, in pixels of an RGB image."""
    about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    scale = min(about["min_size"] / min(image.size), about["max_size"] / max(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    # the model takes multiples of 32: pad on the right and at the bottom
    pixels = np.empty((-(-height // 32) * 32, -(-width // 32) * 32, 3), np.float32)
    pixels[:] = about["padding"]
    pixels[:height, :width] = image.resize((width, height), Image.BILINEAR)
    outputs = session.run(["boxes", "scores", "labels", "masks"], {"images": pixels.transpose(2, 0, 1)[None]})
    found = []
    for box, score, label, mask in zip(*outputs):
        box = np.clip(box.reshape(2, 2) * image.size / (width, height), 0, image.size)
        if score >= about["score_threshold"] and (box[1] > box[0]).all():  # a box in the padding is empty
            # cell i lies on pixel 4 i + 2; one more cell on each side, so that the image's border has neighbours too
            cells = Image.fromarray(np.pad(mask, 1, mode="edge"))
            part = (0.875, 0.875, 0.875 + width / 4, 0.875 + height / 4)
            mask = cells.resize((width, height), Image.BILINEAR, part).resize(image.size, Image.BILINEAR)
            mask = np.asarray(mask) > about["mask_threshold"]
            found.append((about["classes"][label], float(score), box.flatten().tolist(), mask))
    return found


def draw(image: Image.Image, found: list[tuple]) -> Image.Image:
    """Draw the objects into an image, the surest on top."""
    line, font = max(2, max(image.size) // 300), ImageFont.load_default(max(12, max(image.size) // 45))
    pen, found = ImageDraw.Draw(image), list(zip(COLOURS * len(found), sorted(found, key=lambda one: one[1])))
    for colour, (_, _, _, mask) in found:
        image.paste(colour, mask=Image.fromarray(np.uint8(128 * mask)))
    for colour, (name, score, box, _) in found:
        pen.rectangle(box, outline=colour, width=line)
        pen.text(box[:2], f"{name} {score:.2f}", "white", font, stroke_width=line, stroke_fill="black")
    return image


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python onnx_example.py model.onnx photo.jpg found.png")
    model, photo, out = sys.argv[1:]
    picture = ImageOps.exif_transpose(Image.open(photo)).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    objects = find(onnxruntime.InferenceSession(model), picture)
    draw(picture, objects).save(out)
    print(f"objects found: {len(objects)}, drawn in {out}")
