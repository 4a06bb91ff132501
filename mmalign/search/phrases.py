"""A bank of short phrases in English and Chinese: what people might ask of any picture.

Captions tell of some phrases that a store holds them, and of others that it does not. Where there
are no captions, what it holds of them is not known; see `calibrate.UNCALIBRATED`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice

# Things, each with its Chinese name.
_THINGS = """
dog 狗|cat 猫|horse 马|cow 牛|sheep 羊|pig 猪|elephant 大象|bear 熊|lion 狮子|tiger 老虎
monkey 猴子|rabbit 兔子|bird 鸟|duck 鸭子|chicken 鸡|eagle 老鹰|owl 猫头鹰|fish 鱼|shark 鲨鱼
whale 鲸鱼|turtle 乌龟|snake 蛇|frog 青蛙|butterfly 蝴蝶|bee 蜜蜂|spider 蜘蛛|flower 花
rose 玫瑰|tree 树|forest 森林|mountain 山|river 河|lake 湖|beach 海滩|waterfall 瀑布|desert 沙漠
island 岛|cloud 云|rainbow 彩虹|sunset 日落|moon 月亮|star 星星|man 男人|woman 女人|child 孩子
baby 婴儿|old couple 老夫妇|family 一家人|crowd 人群|wedding 婚礼|doctor 医生|teacher 老师
farmer 农民|soldier 士兵|football player 足球运动员|dancer 舞者|musician 音乐家|cook 厨师
cyclist 骑车的人|skier 滑雪的人|swimmer 游泳的人|climber 攀岩的人|car 汽车|truck 卡车
bus 公共汽车|train 火车|bicycle 自行车|motorcycle 摩托车|aeroplane 飞机|helicopter 直升机
ship 船|sailing boat 帆船|bridge 桥|tower 塔|castle 城堡|church 教堂|temple 寺庙|house 房子
skyscraper 摩天大楼|street 街道|market 市场|shop 商店|school 学校|hospital 医院|stadium 体育场
airport 机场|kitchen 厨房|bedroom 卧室|bathroom 浴室|office 办公室|library 图书馆|garden 花园
park 公园|playground 游乐场|farm 农场|bread 面包|cake 蛋糕|pizza 披萨|noodles 面条|rice 米饭
soup 汤|salad 沙拉|apple 苹果|banana 香蕉|strawberry 草莓|cup of coffee 一杯咖啡
cup of tea 一杯茶|bottle of wine 一瓶酒|dress 连衣裙|shirt 衬衫|trousers 裤子|jacket 夹克
hat 帽子|shoe 鞋|boots 靴子|handbag 手提包|watch 手表|glasses 眼镜|umbrella 雨伞|ring 戒指
chair 椅子|table 桌子|sofa 沙发|bed 床|lamp 灯|clock 时钟|mirror 镜子|window 窗户|door 门
book 书|newspaper 报纸|letter 信|map 地图|receipt 收据|chart 图表|handwriting 手写的字
road sign 路牌|flag 旗帜|poster 海报|computer 电脑|keyboard 键盘|telephone 电话|camera 照相机
television 电视|guitar 吉他|piano 钢琴|violin 小提琴|drum 鼓|ball 球|kite 风筝|doll 娃娃
toy car 玩具车|chess board 棋盘|candle 蜡烛|knife 刀|hammer 锤子|key 钥匙|box 盒子|basket 篮子
bench 长椅|statue 雕像|painting 油画|drawing 图画|fountain 喷泉|campfire 篝火|fireworks 烟花
snowman 雪人|tent 帐篷|ladder 梯子|robot 机器人|microscope 显微镜|X-ray of a chest 胸部X光片
smiling face 笑脸|red heart 红心|arrow 箭头|coin 硬币|gift 礼物|balloon 气球
"""
# What is said of a thing, with {} for its name, and the word by which captions say it.
_SAID = """
{}|{}||
a photo of a {}|一张{}的照片||
a drawing of a {}|一幅{}的画|drawing|画
a small {}|一个小小的{}|small|小
a big {}|很大的{}|big|大
a red {}|红色的{}|red|红
a blue {}|蓝色的{}|blue|蓝
a green {}|绿色的{}|green|绿
a yellow {}|黄色的{}|yellow|黄
a white {}|白色的{}|white|白
a black {}|黑色的{}|black|黑
an old {}|旧的{}|old|旧
two of them: {}|两个{}|two|两
many of the kind: {}|许多{}|many|许多
a {} at night|夜里的{}|night|夜
a {} in the snow|雪中的{}|snow|雪
a {} in the rain|雨中的{}|rain|雨
a {} by the sea|海边的{}|sea|海
a {} on a table|桌上的{}|table|桌
a {} in the grass|草地上的{}|grass|草
a {} in the city|城市里的{}|city|城市
a {} indoors|室内的{}|indoors|室内
a {} in the sun|阳光下的{}|sun|阳光
a {} from above|从上面看的{}|above|上面
a {} up close|{}的特写|close up|特写
someone with a {}|一个人和{}|someone|人
a {} beside a wall|墙边的{}|wall|墙
a {} in black and white|黑白的{}|black and white|黑白
"""
# No language has more phrases than this in the bank.
PER_LANGUAGE = 2_000
LANGUAGES = ("other", "zh")


@dataclass(frozen=True)
class Phrase:
    """A phrase of the bank."""

    text: str
    language: str
    """One of `LANGUAGES`, as `relevance.language` tells it."""
    thing: str
    said: str
    """A word for what is said of the thing; empty if nothing is."""


def phrases() -> list[Phrase]:
    """Return the bank, always the same: as many phrases in English as in Chinese, none twice.

    >>> len(phrases()), [phrase.text for phrase in phrases()[:2]]
    (4000, ['dog', '一张狗的照片'])
    """
    columns = [every_phrase(language)[:PER_LANGUAGE] for language in LANGUAGES]
    return [phrase for row in zip(*columns, strict=True) for phrase in row]


def every_phrase(language: str) -> list[Phrase]:
    """Return all that is said of all things; the first ones are of all things."""
    number = LANGUAGES.index(language)
    pairs = [entry.rpartition(" ")[::2] for entry in _THINGS.replace("\n", "|").split("|") if entry]
    said = [line.split("|") for line in _SAID.strip().splitlines()]
    found: dict[str, Phrase] = {}
    # Each round gives every thing the next sentence.
    for turn in range(len(said)):
        for names, frame in zip(pairs, islice(cycle(said), turn + number, None), strict=False):
            text = frame[number].format(names[number])
            found.setdefault(text, Phrase(text, language, names[number], frame[number + 2]))
    return list(found.values())


def told_by(
    captions: Sequence[str], language: str, rows: Sequence[int] | None = None, least: int = 1
) -> tuple[list[Phrase], list[Phrase]]:
    """Return the phrases of a language that captions in it say are there, and say are not.

    There is what a caption names together with what is said of it; no word of what is not there is
    in any caption.

    Args:
        captions: The captions.
        language: One of `LANGUAGES`.
        rows: The row of each; None if each is of another row.
        least: Rows that have to name what is there.

    >>> there, not_there = told_by(["Two cars, one RED."], "other")
    >>> sorted(p.text for p in there), "a small dog" in [p.text for p in not_there]
    (['a photo of a car', 'a red car', 'car', 'two of them: car'], True)
    """
    texts = [_spaced(caption) for caption in captions]
    owners = range(len(texts)) if rows is None else rows

    @cache
    def naming(word: str) -> set[int]:
        if language == "zh":
            return {i for i, text in enumerate(texts) if word in text}
        forms = [_spaced(word + ending) for ending in ("", "s", "es")]
        return {i for i, text in enumerate(texts) if any(form in text for form in forms)}

    def is_there(phrase: Phrase) -> bool:
        named = naming(phrase.thing)
        found = named & naming(phrase.said) if phrase.said else named
        return len({owners[i] for i in found}) >= least

    def is_not_there(phrase: Phrase) -> bool:
        return not any(naming(word) for word in phrase.thing.split() if word not in ("a", "of"))

    bank = every_phrase(language)
    return [p for p in bank if is_there(p)], [p for p in bank if is_not_there(p)]


def _spaced(text: str) -> str:
    """Return the words of a text, each between two spaces."""
    words = re.findall(r"[^\W_]+", text.casefold())
    return f" {' '.join(words)} "
