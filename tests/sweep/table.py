from pathlib import Path
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
def line_of(r):
    def s(x): return f"{x.get('result')} {str(x.get('reason') or '')[:150]}"
    return f"{r['name']:26}{r['reach']:7} {s(r)} {r.get('layout','')} {r.get('fused','')} lora: {s(r.get('lora',{}))} reward: {s(r.get('reward',{}))} {r.get('seconds')}"
def incomplete(r): return []
def page(r): return ""
